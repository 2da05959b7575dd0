"""Every kind of file that the package reads, but images: whatever it holds, the error names it.

Images are in tests/images/test_trust.py, language models alone in
tests/model/language_model/test_mutated_files.py, encoders in tests/encoders/test_broken_files.py.
"""

from pathlib import Path

import pytest

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama
from tests.mutations import require_named_errors


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("parts")
    write_biomedclip(home / "tower", vision="test_vit", image_size=32)
    write_tinyllama(
        home / "llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=420,
    )
    return {"model_name_or_path": str(home / "llama"), "mm_vision_tower": str(home / "tower")}


@pytest.fixture(scope="module")
def loaded(parts):
    return load_pretrained_model(parts)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "saved"
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("config.json", 60),
        ("generation_config.json", 30),
        ("processor_config.json", 40),
        ("tokenizer_config.json", 40),
        ("tokenizer.json", 40),
        ("chat_template.jinja", 20),
        ("model.safetensors", 40),
    ],
)
def test_a_saved_model(whole, name, count):
    def read() -> None:
        load_pretrained_model(whole).answer(None, "What?", max_new_tokens=1)

    require_named_errors(whole / name, read, count=count, is_json=name.endswith(".json"))
