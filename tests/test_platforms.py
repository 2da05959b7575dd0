"""What only Unix has is not needed: imports, functions of `os`, forked workers, locks."""

import ast
import json
import os
import subprocess
import sys

import pytest

from moellava.storage import locking
from tests import house

UNIX_MODULES = {
    "crypt", "curses", "fcntl", "grp", "nis", "ossaudiodev", "posix", "pty", "pwd", "readline",
    "resource", "spwd", "syslog", "termios", "tty",
}  # fmt: skip
# By the documentation of `os`: "Availability: Unix". `kill` is elsewhere another function.
UNIX_FUNCTIONS = {
    "chown", "chroot", "fchmod", "fchown", "fdatasync", "fork", "forkpty", "getegid", "geteuid",
    "getgid", "getgroups", "getloadavg", "getpgid", "getpgrp", "getuid", "kill", "killpg", "lchown",
    "mkfifo", "mknod", "nice", "openpty", "posix_fadvise", "posix_fallocate", "pread", "pwrite",
    "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile", "setpgid", "setsid",
    "setuid", "statvfs", "sync", "sysconf", "uname", "wait", "waitid",
}  # fmt: skip
# Behind a guard that a person has read: where, and what guards it.
GUARDED = {
    ("storage/locking.py", "fcntl"): "except ImportError",
    ("memory.py", "resource"): "except ImportError",
    ("cli/chat.py", "readline"): "suppress(ImportError)",
    ("storage/locking.py", "register_at_fork"): "hasattr",
    ("storage/locking.py", "kill"): "_IS_WINDOWS",
    ("images/threads.py", "sched_getaffinity"): "hasattr",
}


def uses_of_unix(text: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & UNIX_MODULES
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[0]} & UNIX_MODULES
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            found |= {node.attr} & UNIX_FUNCTIONS
    return found


def test_what_only_unix_has_stands_behind_a_guard():
    found = {
        (path.relative_to(house.PACKAGE).as_posix(), name)
        for path in house.python_files(house.PACKAGE)
        for name in uses_of_unix(path.read_text(encoding="utf-8"))
    }
    assert found == GUARDED.keys()
    for (module, _), guard in GUARDED.items():
        assert guard in (house.PACKAGE / module).read_text(encoding="utf-8")


def test_the_scan_finds_what_it_looks_for():
    assert uses_of_unix("import pwd\nfrom fcntl import flock\nos.fork()\nos.path.join()") == {
        "pwd",
        "fcntl",
        "fork",
    }


def test_files_are_read_and_written_in_a_named_encoding():
    """Windows' own is not UTF-8."""
    nameless = []
    for path in house.python_files(house.PACKAGE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("read_text", "write_text"):
                continue
            is_named = any(word.arg == "encoding" for word in node.keywords)
            if not is_named and not (node.func.attr == "read_text" and node.args):
                nameless.append(f"{path.relative_to(house.PACKAGE).as_posix()}:{node.lineno}")
    # ASCII: a file of the kernel, and stand-ins for tests.
    allowed = ("memory.py", "testing/")
    assert [place for place in nameless if not place.startswith(allowed)] == []


# Without what Unix has, every module is imported and a stage is trained, whose data are read in
# spawned workers. Other people's libraries are imported before.
CODE = """
import importlib, json, multiprocessing, os, pkgutil, sys
from pathlib import Path

def main():
    import accelerate, datasets, peft, psutil, torch, transformers, trl.trainer.grpo_trainer
    import torch.distributed.fsdp
    from tests.train.tiny import losses, tiny_recipe
    for name in json.loads(sys.argv[2]):
        sys.modules[name] = None
    for name in json.loads(sys.argv[3]):
        if hasattr(os, name):
            delattr(os, name)
    for name in [name for name in sys.modules if name.split(".")[0] == "moellava"]:
        del sys.modules[name]
    del sys.modules["tests.train.tiny"]
    from tests.train.tiny import losses, tiny_recipe
    import moellava
    for module in pkgutil.walk_packages(moellava.__path__, "moellava."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # lmms-eval, vLLM
            if error.name.split(".")[0] not in ("lmms_eval", "vllm", "swift", "llamafactory"):
                raise
    from moellava.train import train
    folder = Path(sys.argv[1])
    settings = ("optim.max_steps=2", "optim.warmup=0", "data.group_by_length=false")
    found = {}
    for workers in (0, 1):
        recipe = tiny_recipe(
            Path(sys.argv[4]), "align", folder / str(workers), *settings,
            f"data.num_workers={workers}",
            trainer={"dataloader_multiprocessing_context": "spawn"} if workers else {},
        )
        found[workers] = losses(train(recipe, show_progress=False))
    print(json.dumps(found))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow(40)
def test_a_stage_trains_without_unix_and_with_spawned_workers(tmp_path):
    from tests.train.tiny import write_tiny

    tiny = tmp_path / "tiny"
    tiny.mkdir()
    write_tiny(tiny)
    script = tmp_path / "script.py"
    script.write_text(CODE, encoding="utf-8")
    # The libraries' own modules need `posix` and `pwd`; `os.wait` and `os.kill` end workers.
    modules = sorted({"fcntl", "resource", "readline", "termios", "grp"})
    functions = sorted(UNIX_FUNCTIONS - {"kill", "wait", "uname", "sysconf", "sendfile", "statvfs"})
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), json.dumps(modules), json.dumps(functions),
         str(tiny)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(house.PACKAGE.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["0"] == pytest.approx(found["1"], rel=1e-6)
    assert len(found["0"]) == 2


class OsWithoutKill:
    def __getattr__(self, name):
        return pytest.fail("sent Ctrl-C to a process") if name == "kill" else getattr(os, name)


@pytest.fixture
def on_windows(monkeypatch):
    """What `locked` takes to be Windows: no flock, and signal 0 is Ctrl-C."""
    monkeypatch.setattr(locking, "_IS_WINDOWS", True)
    monkeypatch.setattr(locking, "fcntl", None)
    monkeypatch.setattr(locking, "os", OsWithoutKill())


def test_a_lock_on_windows_is_held_and_given_back(on_windows, tmp_path):
    with locking.locked(tmp_path):
        with (
            pytest.raises(OSError, match=rf"in use by another process \(pid {os.getpid()}"),
            locking.locked(tmp_path),
        ):
            pass
        assert (tmp_path / locking.FOLDER_LOCK).is_file()
    assert not (tmp_path / locking.FOLDER_LOCK).exists()


def test_a_lock_on_windows_of_a_process_that_is_gone_is_taken_over(on_windows, tmp_path):
    import socket

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock = tmp_path / locking.FOLDER_LOCK
    lock.write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    with locking.locked(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_an_open_lock_is_closed_before_it_is_deleted_on_windows(on_windows, tmp_path, monkeypatch):
    from pathlib import Path

    unlink = Path.unlink

    def unlink_closed(self, *args, **kwargs):
        open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert os.path.realpath(self) not in open_files
        unlink(self, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink_closed)
    with locking.locked(tmp_path):
        pass
