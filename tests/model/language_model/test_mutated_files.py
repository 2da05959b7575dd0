"""Broken files of language models: whatever they hold, errors are of an expected kind.

A few hundred mutations with a fixed seed; MOELLAVA_MUTATIONS=20 makes it twenty times as many.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moellava.model.language_model import LlamaMoeConfig, imported_state_dict, read_state_dict
from moellava.model.language_model.router_weights import read_router
from tests.model.language_model.test_mixtures import make_mixtral, write_moe_llava

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
    """A JSON object with one value, at any depth, replaced or removed."""
    whole = json.loads(content)
    place = whole
    while True:
        key = generator.choice(sorted(place))
        if not isinstance(place[key], dict) or not place[key] or generator.random() < 0.3:
            break
        place = place[key]
    if generator.random() < 0.2:
        del place[key]
    else:
        place[key] = generator.choice(VALUES)
    return json.dumps(whole).encode()


def mutations(content: bytes, *, count: int, seed: int, is_json: bool) -> Iterator[bytes]:
    generator = random.Random(seed)
    yield from WHOLE_FILES
    for _ in range(count * TIMES):
        if is_json and generator.random() < 0.7:
            yield broken_value(content, generator)
        else:
            yield broken_bytes(content, generator)


def require_named_errors(
    file: Path, read: Callable[[], object], *, count: int, is_json: bool, seed: int = 0
) -> None:
    """Mutate a file in place; every reading succeeds or fails as promised, and some fail."""
    content = file.read_bytes()
    num_refused = 0
    for index, mutated in enumerate(mutations(content, count=count, seed=seed, is_json=is_json)):
        file.write_bytes(mutated)
        error = error_of(read)
        if error is None:
            continue
        num_refused += 1
        where = f"mutation {index} of {file.name}: {type(error).__name__}: {error}"
        assert isinstance(error, EXPECTED), where
        # Parsers' own kinds are subclasses of ValueError.
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), where
        assert file.parent.name in str(error), where
        assert "weights_only=False" not in str(error), where
    file.write_bytes(content)
    assert error_of(read) is None
    assert num_refused > len(WHOLE_FILES) // 2


def error_of(read: Callable[[], object]) -> BaseException | None:
    try:
        read()
    except BaseException as error:  # panics of Rust libraries are not Exceptions
        return error
    return None


@pytest.fixture
def checkpoint(make_dense, tmp_path) -> Path:
    make_dense(num_hidden_layers=1, vocab_size=11).save_pretrained(tmp_path / "broken-model")
    return tmp_path / "broken-model"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_a_dense_checkpoint(checkpoint, name):
    is_json = name.endswith(".json")
    require_named_errors(
        checkpoint / name, lambda: read_state_dict(checkpoint), count=60, is_json=is_json
    )


def test_a_pickle(make_dense, tmp_path):
    folder = tmp_path / "broken-model"
    dense = make_dense(num_hidden_layers=1, vocab_size=11)
    dense.config.save_pretrained(folder)
    file = folder / "pytorch_model.bin"
    torch.save(dense.state_dict(), file)
    require_named_errors(file, lambda: read_state_dict(folder), count=60, is_json=False)


def test_an_index_of_shards(make_dense, tmp_path):
    folder = tmp_path / "broken-model"
    make_dense(num_hidden_layers=1, vocab_size=11).save_pretrained(folder, max_shard_size="10KB")
    index = folder / "model.safetensors.index.json"
    require_named_errors(index, lambda: read_state_dict(folder), count=60, is_json=True)


def test_a_published_mixtures_config(tiny, tmp_path):
    small = {**tiny, "num_hidden_layers": 1, "vocab_size": 11}
    state_dict = make_mixtral(small).state_dict()
    folder = write_moe_llava(tmp_path / "broken-model", small, state_dict, layers=[0], top_k=2)
    require_named_errors(
        folder / "config.json", lambda: imported_state_dict(folder), count=60, is_json=True
    )


def test_a_routers_file(tmp_path):
    (tmp_path / "broken-model").mkdir()
    file = tmp_path / "broken-model" / "router.pth"
    torch.save({"fc1.weight": torch.zeros(4, 32)}, file)
    config = LlamaMoeConfig(hidden_size=32, num_attention_heads=4, num_experts=4)
    require_named_errors(file, lambda: read_router(file, config), count=40, is_json=False)


def test_an_index_does_not_read_outside_its_folder(make_dense, tmp_path):
    folder = tmp_path / "model"
    make_dense().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = make_dense().state_dict()
    weight_map = dict.fromkeys(names, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"'\.\./outside\.safetensors', which is not a plain name"):
        read_state_dict(folder)
