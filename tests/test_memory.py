"""The peak memory of a process."""

from tests.processes import printed

CODE = """
from moellava.memory import peak_memory_mib
before = peak_memory_mib()
block = b"x" * (200 << 20)
del block
print(peak_memory_mib() - before)
"""


def test_the_peak_counts_memory_that_was_given_back():
    (growth,) = printed(CODE)
    assert 190 < float(growth) < 210
