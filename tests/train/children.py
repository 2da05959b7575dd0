"""What a forked process of several is told and how it ends: `free_port`, `in_child`."""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_child(
    body: Callable[[], object], *, rank: int = 0, num_processes: int = 1, port: int = 0
) -> int:
    """Run `body` as one of several processes; the exit status, with the error on stderr."""
    if num_processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
    try:
        body()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
