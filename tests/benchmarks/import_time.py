"""`import moellava` against importing transformers' Llama: what it costs beyond that, in fresh interpreters.

python tests/benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

# One interpreter for both, since the seconds of an import differ more from one process to the next than what is asked.
TIMED = """
import time
start = time.perf_counter()
import transformers.models.llama.modeling_llama
middle = time.perf_counter()
import moellava
print(middle - start, time.perf_counter() - middle)
"""
NUM_ROUNDS = 7


def main() -> None:
    rounds = []
    for _ in range(NUM_ROUNDS + 1):
        output = subprocess.run(
            [sys.executable, "-c", TIMED], check=True, capture_output=True, text=True
        ).stdout
        rounds.append([float(number) for number in output.split()])
    llama, more = zip(*rounds[1:], strict=True)  # the first round warms the disk
    print("| import | seconds, median (range) | asked |")
    print("|---|---|---|")
    print(
        f"| transformers' Llama | {statistics.median(llama):.2f} ({min(llama):.2f}-{max(llama):.2f}) | |"
    )
    print(
        f"| moellava besides | {statistics.median(more):.2f} ({min(more):.2f}-{max(more):.2f}) | 0.5 |"
    )


if __name__ == "__main__":
    main()
