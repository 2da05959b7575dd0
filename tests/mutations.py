"""Damaged files: how they are damaged, and what must come of reading them.

A few hundred with a fixed seed in CI; MOELLAVA_MUTATIONS=20 makes it twenty times as many.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

TIMES = int(os.environ.get("MOELLAVA_MUTATIONS", "1"))
EXPECTED = (ValueError, OSError, ImportError, TypeError)
WHOLE_FILES = (
    b"",
    b"\x00" * 64,
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"[]",
    b"null",
    b'"text"',
    b'{"weight_map": []}',
    b'{"weight_map": {"model.norm.weight": "../../outside.safetensors"}}',
    '{"model_type": "llama"}'.encode("utf-16"),
    '{"model_type": "läma"}'.encode("latin-1"),
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
)
VALUES = (
    None,
    -1,
    0,
    1,
    10**9,
    10**30,
    0.5,
    1e308,
    float("nan"),
    True,
    "x",
    "",
    [],
    {},
    [[]],
    [-1],
)


def broken_bytes(content: bytes, generator: random.Random) -> bytes:
    """The content with a few bytes changed, lost or added, more often at its start."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8))):
        place = int(len(data) * generator.random() ** 3)
        kind = generator.randrange(4)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data[place:place] = generator.randbytes(generator.randrange(1, 9))
        elif kind == 2:
            del data[place : place + generator.randrange(1, 9)]
        elif place < len(data):
            data[place] = generator.randrange(256)
        if not data:
            break
    return bytes(data)


def broken_value(content: bytes, generator: random.Random) -> bytes:
    """JSON with one value, at any depth, replaced or removed."""
    whole = json.loads(content)
    places: list[tuple[dict | list, object]] = []

    def walk(node: object) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node)  # type: ignore[arg-type]
        for key, value in pairs:
            places.append((node, key))  # type: ignore[arg-type]
            if isinstance(value, dict | list):
                # A long list is of a kind: its first values say enough.
                walk(value[:4] if isinstance(value, list) else value)

    walk(whole)
    # Half of the times one of the outermost: a vocabulary has thousands inside.
    outer = [place for place in places if place[0] is whole]
    node, key = generator.choice(outer if generator.random() < 0.5 else places)
    if generator.random() < 0.2:
        del node[key]  # type: ignore[arg-type]
    else:
        node[key] = generator.choice(VALUES)  # type: ignore[index]
    return json.dumps(whole).encode()


def mutations(content: bytes, *, count: int, seed: int, is_json: bool) -> Iterator[bytes]:
    """Files of other kinds, and then `count` times as many as asked of damaged ones."""
    generator = random.Random(seed)
    yield from WHOLE_FILES
    for _ in range(count * TIMES):
        if is_json and generator.random() < 0.7:
            yield broken_value(content, generator)
        else:
            yield broken_bytes(content, generator)


def require_named_errors(
    file: Path, read: Callable[[], object], *, count: int, is_json: bool = False, seed: int = 0
) -> None:
    """Mutate a file in place; every reading succeeds or fails as promised, and some fail.

    An error names the file, its folder or the folder above.
    """
    content = file.read_bytes()
    num_refused, broken = 0, []
    try:
        for index, data in enumerate(mutations(content, count=count, seed=seed, is_json=is_json)):
            file.write_bytes(data)
            error = error_of(read)
            if error is None:
                continue
            num_refused += 1
            if reason := what_is_wrong(error, file):
                broken.append(f"mutation {index}: {reason}: {type(error).__name__}: {error}")
    finally:
        file.write_bytes(content)
    assert not broken, "\n".join([f"{len(broken)} of {file.name}", *broken[:10]])
    assert error_of(read) is None
    assert num_refused > len(WHOLE_FILES) // 2


def what_is_wrong(error: BaseException, file: Path) -> str | None:
    """Why an error is not of the kind that callers expect."""
    if not isinstance(error, EXPECTED):
        return "not an expected kind"
    # Parsers' own kinds are subclasses of ValueError.
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        return "a parser's own kind"
    if not any(str(place) in str(error) for place in (file.name, file.parent, file.parent.parent)):
        return "names no file"
    if "weights_only=False" in str(error):
        return "advises to load unsafely"
    return None


def error_of(read: Callable[[], object]) -> BaseException | None:
    try:
        read()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of Rust libraries are not Exceptions
        return error
    return None
