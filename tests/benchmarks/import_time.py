"""`import moellava` against importing transformers' Llama, each in fresh interpreters, alternating.

python tests/benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

STATEMENTS = {
    "transformers' Llama": "import transformers.models.llama.modeling_llama",
    "moellava": "import moellava",
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
NUM_ROUNDS = 7


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(NUM_ROUNDS + 1):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", TIMED.format(statement)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds[name].append(float(output))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms the disk
    for name, values in seconds.items():
        print(f"{name:20} {medians[name]:6.2f} s   (min {min(values[1:]):.2f}, max {max(values[1:]):.2f})")
    print(f"{'difference':20} {medians['moellava'] - medians[next(iter(STATEMENTS))]:6.2f} s   bound: 0.5 s")


if __name__ == "__main__":
    main()
