"""No file of a saved model, of any kind, holds a path of this machine."""

from pathlib import Path

import pytest

from moellava.encoders import create_encoder
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.difference import save_trainable
from moellava.model.checkpoint.projector_file import save_projector
from moellava.model.publish.remote_code import write_remote_code
from moellava.testing import write_biomedclip, write_tinyllama


def files_with_paths(folder: Path) -> list[str]:
    """The files below a folder that hold a path of the tests: their own or the stand-ins'.

    The headers of weights are looked at too.
    """
    places = [str(folder.parents[1]).encode(), b"moellava-hub-", b"of-a-hospital"]
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(place in path.read_bytes() for place in places)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the parts of a model, of which every file could name it."""
    home = tmp_path_factory.mktemp("of-a-hospital") / "parts"
    write_biomedclip(home / "tower", vision="test_vit", image_size=32)
    write_tinyllama(home / "llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return home


def parts_of(home: Path) -> dict[str, str]:
    return {"model_name_or_path": str(home / "llama"), "mm_vision_tower": str(home / "tower")}


@pytest.fixture(params=["built of its parts", "opened from a folder"])
def local(home, request, tmp_path_factory):
    loaded = load_pretrained_model(parts_of(home))
    if request.param == "built of its parts":
        return loaded
    folder = tmp_path_factory.mktemp("of-a-hospital") / "first"
    write_whole(loaded, folder)
    return load_pretrained_model(folder)


def write_whole(loaded, folder: Path, base: object = None) -> None:
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


def write_with_code(loaded, folder: Path, base: object) -> None:
    write_whole(loaded, folder)
    write_remote_code(folder)


def write_difference(loaded, folder: Path, base) -> None:
    save_trainable(loaded, folder, base=base)


def write_adapter(loaded, folder: Path, base) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(loaded.model, peft.LoraConfig(target_modules=["q_proj"]))
    save_trainable(adapted, folder, processor=loaded.processor, base=base)


def write_projector(loaded, folder: Path, base: object) -> None:
    save_projector(loaded.model, folder)


KINDS = (write_whole, write_with_code, write_difference, write_adapter, write_projector)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_no_file_of_a_saved_model_holds_a_path(local, home, tmp_path, write):
    folder = tmp_path / "new" / "saved"
    write(local, folder, parts_of(home))
    assert files_with_paths(folder) == []


def test_no_file_of_a_saved_encoder_holds_a_path(home, tmp_path):
    folder = tmp_path / "new" / "encoder"
    create_encoder("auto", home / "tower").save_pretrained(folder)
    assert files_with_paths(folder) == []


def test_the_search_finds_a_path(tmp_path):
    (tmp_path / "new" / "saved").mkdir(parents=True)
    (tmp_path / "new" / "saved" / "a.json").write_text(f'{{"x": "{tmp_path}/llama"}}')
    assert files_with_paths(tmp_path / "new" / "saved") == ["a.json"]
