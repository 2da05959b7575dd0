"""The memory that this process has needed so far: `peak_memory_mib`."""

import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")


def peak_memory_mib() -> float:
    """Highest resident memory of the process so far, in MiB.

    On Windows psutil is asked, which comes with accelerate; without it the answer is NaN.
    """
    if _STATUS.exists():
        return _peak_on_linux()
    if resource is None:
        return _peak_on_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, else KiB


def _peak_on_linux() -> float:
    # Not ru_maxrss: a child process starts with the peak of the process that started it.
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 2**10


def _peak_on_windows() -> float:
    try:
        import psutil
    except ImportError:
        return float("nan")
    return float(psutil.Process().memory_info().peak_wset) / 2**20
