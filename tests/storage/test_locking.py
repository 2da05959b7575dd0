"""Two processes do not work in one place; a killed one's lock is taken over."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moellava.storage import locking
from moellava.storage.locking import FOLDER_LOCK, locked

HOLDER = """
import sys, time
from moellava.storage.locking import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_second_process_is_told_who_holds_it_and_a_killed_one_is_taken_over(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "folder":
        path.mkdir()
    process = hold(path)
    try:
        message = rf"run is in use by another process \(pid {process.pid} on "
        with pytest.raises(OSError, match=message + re.escape(socket.gethostname())):
            locked(path).__enter__()
    finally:
        process.kill()
        process.wait()
    left = path / FOLDER_LOCK if kind == "folder" else tmp_path / "run.lock"
    assert json.loads(left.read_text())["pid"] == process.pid
    with locked(path):
        assert json.loads(left.read_text())["pid"] == os.getpid()
    assert not left.exists()


def test_one_process_does_not_hold_a_place_twice(tmp_path):
    with locked(tmp_path), pytest.raises(OSError, match=rf"pid {os.getpid()} "):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


def test_the_lock_is_dropped_when_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "x"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "[]", '{"pid": "x"}', '{"pid": 99999999'])
def test_a_lock_file_that_nobody_holds_is_taken_over_whatever_it_says(tmp_path, content):
    (tmp_path / "x.lock").write_text(content)
    with locked(tmp_path / "x"):
        pass


def test_without_locks_of_the_file_system_the_pid_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "fcntl", None)
    lock = tmp_path / "x.lock"
    with locked(tmp_path / "x"), pytest.raises(OSError, match="in use by another process"):
        locked(tmp_path / "x").__enter__()
    lock.write_text(json.dumps({"pid": 99999999, "host": socket.gethostname()}))
    with locked(tmp_path / "x"):
        pass
    lock.write_text(json.dumps({"pid": 99999999, "host": "another"}))
    with pytest.raises(OSError, match=r"pid 99999999 on another.*delete .*x\.lock"):
        locked(tmp_path / "x").__enter__()
