"""What starting costs: `moellava --help` beside an empty Python, our classes beside transformers'.

python tests/benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

# One interpreter for both: processes differ more from each other than what is asked.
TIMED = """
import time
start = time.perf_counter()
import transformers.models.llama.modeling_llama
middle = time.perf_counter()
import moellava.model
print(middle - start, time.perf_counter() - middle)
"""
NUM_ROUNDS = 7


def main() -> None:
    """Print both tables; the first round of each warms the disk and is left out."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "python -c 'import moellava'": ["-c", "import moellava"],
        "moellava --version": ["-m", "moellava.cli", "--version"],
        "moellava --help": ["-m", "moellava.cli", "--help"],
    }
    print("| start | seconds, median (range) | beyond python -c pass | asked |\n|---|---|---|---|")
    seconds = {
        name: [_run(arguments) for _ in range(NUM_ROUNDS + 1)][1:]
        for name, arguments in commands.items()
    }
    empty = statistics.median(seconds["python -c pass"])
    for name, found in seconds.items():
        print(f"| {name} | {_spread(found)} | {statistics.median(found) - empty:.2f} | 0.30 |")

    rounds = []
    for _ in range(NUM_ROUNDS + 1):
        output = subprocess.run(
            [sys.executable, "-c", TIMED], check=True, capture_output=True, text=True
        ).stdout
        rounds.append([float(number) for number in output.split()])
    llama, more = zip(*rounds[1:], strict=True)
    print("\n| import | seconds, median (range) | asked |\n|---|---|---|")
    print(f"| transformers' Llama | {_spread(llama)} | |")
    print(f"| moellava.model besides | {_spread(more)} | 0.5 |")


def _run(arguments: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main()
