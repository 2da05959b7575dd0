"""No code of a checkpoint's folder is run, and nothing is asked on the terminal."""

import builtins
import contextlib
import json
import shutil

import pytest

from moellava.model.builder_enhanced import (
    load_model_config,
    load_pretrained_model,
    load_tokenizer,
)
from moellava.model.checkpoint.difference import load_trainable
from moellava.model.checkpoint.llava import read_llava
from moellava.model.checkpoint.projector_file import read_projector
from moellava.model.language_model import read_state_dict
from moellava.testing import TINYLLAMA, write_llava

TRAP = """
from pathlib import Path
Path({marker!r}).touch()
class Trap:
    pass
"""
AUTO_MAP = dict.fromkeys(
    (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoProcessor",
        "AutoImageProcessor",
    ),
    "trap.Trap",
)
FILES = {
    "config.json": {"model_type": "trap", "auto_map": AUTO_MAP},
    "tokenizer_config.json": {
        "tokenizer_class": "Trap",
        "auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]},
    },
    "processor_config.json": {"processor_class": "Trap", "auto_map": AUTO_MAP},
    "preprocessor_config.json": {"image_processor_type": "Trap", "auto_map": AUTO_MAP},
    "generation_config.json": {"trust_remote_code": True},
    "base.json": {},
}
LOADERS = {
    "config": load_model_config,
    "tokenizer": load_tokenizer,
    "saved model": load_pretrained_model,
    "difference": load_trainable,
    "llava": read_llava,
    "projector": read_projector,
    "weights of a language model": read_state_dict,
    "language model": lambda folder: load_pretrained_model(
        {"model_name_or_path": str(folder), "mm_vision_tower": str(folder)}
    ),
    "dense language model": lambda folder: load_pretrained_model(
        {"model_name_or_path": str(folder), "mm_vision_tower": str(folder)}, moe_config=False
    ),
}


@pytest.fixture
def answers_yes(monkeypatch):
    """Whoever asks whether to run code is told yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


def set_trap(folder, marker, **settings):
    (folder / "trap.py").write_text(TRAP.format(marker=str(marker)))
    for name, trap in FILES.items():
        path = folder / name
        own = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(own | trap | settings.get(name.partition(".")[0], {})))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_of_traps_runs_nothing(loader, hub_cache, tmp_path, answers_yes):
    folder = shutil.copytree(hub_cache[TINYLLAMA], tmp_path / "trapped")
    set_trap(folder, tmp_path / "ran")
    with pytest.raises((OSError, ValueError)):
        LOADERS[loader](folder)
    assert not (tmp_path / "ran").exists()


# transformers has a config of these types, but no model of every class: it would ask for code.
KNOWN_TYPES = ("vit", "align_text_model")


@pytest.mark.parametrize("model_type", KNOWN_TYPES)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_known_type_whose_model_only_code_has(
    loader, model_type, hub_cache, tmp_path, answers_yes
):
    folder = shutil.copytree(hub_cache[TINYLLAMA], tmp_path / "trapped")
    set_trap(
        folder,
        tmp_path / "ran",
        config={"model_type": model_type},
        tokenizer_config={"tokenizer_class": "LlamaTokenizer"},
    )
    with contextlib.suppress(OSError, ValueError):  # a config and a tokenizer can be read
        LOADERS[loader](folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_of_a_saved_model_whose_model_only_code_has(loaded, tmp_path, answers_yes, part):
    folder = tmp_path / "saved"
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    (folder / "trap.py").write_text(TRAP.format(marker=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    trap = {"model_type": "align_text_model", "auto_map": {"AutoModel": f"{folder}--trap.Trap"}}
    (folder / "config.json").write_text(json.dumps(config | {part: config[part] | trap}))
    with pytest.raises((OSError, ValueError, TypeError)):
        load_pretrained_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_language_model_of_a_known_type_with_traps_beside_it(
    parts, tmp_path, hub_cache, answers_yes
):
    folder = shutil.copytree(hub_cache[TINYLLAMA], tmp_path / "trapped")
    set_trap(
        folder,
        tmp_path / "ran",
        config={"model_type": "llama"},
        tokenizer_config={"tokenizer_class": "LlamaTokenizer"},
    )
    with contextlib.suppress(OSError, ValueError):
        load_pretrained_model(parts | {"model_name_or_path": str(folder)})
    assert not (tmp_path / "ran").exists()


def test_a_saved_model_with_traps_beside_it(loaded, tmp_path, answers_yes):
    folder = tmp_path / "saved"
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    set_trap(
        folder,
        tmp_path / "ran",
        config={"model_type": "moellava"},
        tokenizer_config={"tokenizer_class": "LlamaTokenizer"},
        processor_config={"processor_class": "MoeLlavaProcessor"},
    )
    (folder / "base.json").unlink()
    with contextlib.suppress(OSError, ValueError):
        load_pretrained_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_llava_with_traps_beside_it(tmp_path, answers_yes):
    folder = write_llava(tmp_path / "llava")
    set_trap(
        folder,
        tmp_path / "ran",
        config={"model_type": "llava"},
        processor_config={"processor_class": "LlavaProcessor"},
        tokenizer_config={"tokenizer_class": "LlamaTokenizer"},
        preprocessor_config={"image_processor_type": "CLIPImageProcessor"},
    )
    with contextlib.suppress(OSError, ValueError):
        load_pretrained_model(folder)
    assert not (tmp_path / "ran").exists()
