"""One process at a time in a folder or on a file: `locked`."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_IS_WINDOWS = sys.platform == "win32"
FOLDER_LOCK = ".moellava.lock"
_HELD: set[int] = set()  # descriptors of this process's locks


def _close_in_child() -> None:
    """A fork, such as a data loader's worker, must not keep a lock whose holder was killed."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file or folder against other processes until the block ends.

    The lock is a file, `.moellava.lock` in a folder and `<name>.lock` beside a file, which names
    its holder. The operating system drops the lock with its process, so that one left by a killed
    process is taken over.

    Raises:
        OSError: another process holds it; its pid, host and start are named.
    """
    path = Path(path)
    lock = path / FOLDER_LOCK if path.is_dir() else path.with_name(f"{path.name}.lock")
    descriptor = _acquire(path, lock)
    _HELD.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _HELD:  # not in a fork of the holder
            _HELD.discard(descriptor)
            _release(descriptor, lock)


def _release(descriptor: int, lock: Path) -> None:
    if _IS_WINDOWS:  # which deletes no open file
        os.close(descriptor)
        lock.unlink(missing_ok=True)
    else:
        lock.unlink(missing_ok=True)  # before the lock is dropped: nobody else's is removed
        os.close(descriptor)


def _acquire(path: Path, lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(descriptor, lock):
                raise OSError(
                    f"{path} is in use by another process ({_holder(lock)}). Wait until it ends, "
                    f"or give another name. If it runs no more, delete {lock}."
                )
            if _is_same_file(descriptor, lock):
                mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(mine).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder ended and removed it meanwhile: try the new one


def _try_lock(descriptor: int, lock: Path) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks: the pid decides
    return not _runs_here(_read(lock))


def _is_same_file(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _holder(lock: Path) -> str:
    content = _read(lock)
    if not content:
        return "which has not said its name yet"
    return f"pid {content.get('pid')} on {content.get('host')}, since {content.get('since')}"


def _read(lock: Path) -> dict[str, object]:
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # empty for a moment, or gone
        return {}
    return content if isinstance(content, dict) else {}


def _runs_here(holder: dict[str, object]) -> bool:
    """Whether a holder may still run; of another host nothing is known, so it may."""
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    if holder.get("host") != socket.gethostname():
        return True
    if _IS_WINDOWS:
        return _runs_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs under another user
    return True


def _runs_on_windows(pid: int) -> bool:
    # os.kill(pid, 0) would send Ctrl-C there.
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return True
    return bool(psutil.pid_exists(pid))


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
