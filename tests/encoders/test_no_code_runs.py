"""Folders that carry code: it never runs, and nobody is asked whether it may."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

from moellava.encoders import BiomedClipEncoder, ClipEncoder, create_encoder
from moellava.testing import OPENAI_CLIP

TRAP = """
from pathlib import Path
(Path({folder!r}) / "ran").touch()
from transformers import BertConfig, BertModel, BertTokenizer, BitImageProcessor
class Trap(BertTokenizer): pass
class TrapConfig(BertConfig): model_type = "trap"
class TrapModel(BertModel): config_class = TrapConfig
class TrapProcessor(BitImageProcessor): pass
"""
AUTO_MAP = {
    "AutoConfig": "trap.TrapConfig",
    "AutoModel": "trap.TrapModel",
    "AutoImageProcessor": "trap.TrapProcessor",
    "AutoProcessor": "trap.TrapProcessor",
    "AutoTokenizer": ["trap.Trap", "trap.Trap"],
}


@pytest.fixture
def arm(tmp_path, monkeypatch):
    """A function that puts the trap into a folder; whoever asks on the terminal hears yes."""
    asked = []

    def answer_yes(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer_yes)

    def arm_folder(folder: Path) -> Path:
        (folder / "trap.py").write_text(TRAP.format(folder=str(tmp_path)))
        for path in folder.glob("*config.json"):
            if path.name != "open_clip_config.json":
                change(path, {"auto_map": AUTO_MAP})
        return folder

    yield arm_folder
    assert not (tmp_path / "ran").exists()
    assert asked == []


def change(path: Path, settings: dict) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | settings))


def with_text_cfg(repo: Path, folder: Path, **settings) -> Path:
    shutil.copytree(repo, folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"].update(settings)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"tokenizer_type": "trap"},
        {"bpe_path": "/etc/hostname"},
        {"cache_dir": "/"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_tokenizer_go_through_an_allow_list(
    small_biomedclip, hub_cache, tmp_path, arm, options
):
    folder = arm(with_text_cfg(small_biomedclip, tmp_path / "repo", tokenizer_kwargs=options))
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"tokenizer_kwargs.*{name!r}.*known: .*clean"):
        BiomedClipEncoder.from_pretrained(folder, load_text=True)


def test_usual_options_of_a_tokenizer_are_taken(small_biomedclip, hub_cache, tmp_path, arm):
    options = {"clean": "lower", "strip_sep_token": False}
    folder = with_text_cfg(small_biomedclip, tmp_path / "repo", tokenizer_kwargs=options)
    encoder = BiomedClipEncoder.from_pretrained(folder, load_text=True)
    assert encoder.encode_text(["A  Chest"]).shape[0] == 1


def test_code_of_a_tokenizer_does_not_run(small_biomedclip, hub_cache, tmp_path, arm):
    folder = shutil.copytree(small_biomedclip, tmp_path / "repo")
    change(folder / "tokenizer_config.json", {"tokenizer_class": "Trap", "auto_map": AUTO_MAP})
    arm(folder)
    try:
        BiomedClipEncoder.from_pretrained(folder, load_text=True)
    except (ValueError, OSError) as error:
        assert "tokenizer" in str(error)  # noqa: PT017  (without the code it may load, too)


@pytest.mark.parametrize("model_type", ["dinov2", "trap"])
def test_code_of_a_tower_and_its_processor_does_not_run(tmp_path, arm, model_type):
    folder = tmp_path / "dinov2"
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(folder)
    change(
        folder / "preprocessor_config.json",
        {"image_processor_type": "TrapProcessor", "auto_map": AUTO_MAP},
    )
    arm(folder)
    change(folder / "config.json", {"model_type": model_type})
    with pytest.raises((ValueError, OSError), match=r"dinov2|trust_remote_code"):
        create_encoder("dinov2", folder)


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "nothing", ""])
def test_the_image_processor_of_a_saved_encoder_is_an_image_processor(
    hub_cache, tmp_path, arm, name
):
    ClipEncoder.from_pretrained(OPENAI_CLIP).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    settings = {"image_processor_type": name, "task": "fill-mask", "trust_remote_code": True}
    change(path, {"processor_config": settings})
    encoder = create_encoder("auto", arm(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"image_processor_type .* is not an image processor"):
        _ = encoder.image_processor


def test_a_saved_encoder_with_a_trap_loads_without_it(hub_cache, tmp_path, arm):
    ClipEncoder.from_pretrained(OPENAI_CLIP).save_pretrained(tmp_path / "saved")
    encoder = create_encoder("auto", arm(tmp_path / "saved"))
    assert type(encoder) is ClipEncoder
    assert type(encoder.image_processor).__name__ != "TrapProcessor"


def test_the_trap_would_run_where_it_is_trusted(tmp_path):
    """The oracle can say no."""
    (tmp_path / "trap.py").write_text(TRAP.format(folder=str(tmp_path)))
    settings = {"image_processor_type": "TrapProcessor", "auto_map": AUTO_MAP}
    change(tmp_path / "preprocessor_config.json", settings)
    AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["hf-hub:timm/vit", "local-dir:/etc", "a/b"])
def test_the_architecture_of_a_tower_is_a_name_not_a_place(small_biomedclip, tmp_path, arm, name):
    folder = shutil.copytree(small_biomedclip, tmp_path / "repo")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = name
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"timm_model_name .* expected the name of an architecture"
    ):
        BiomedClipEncoder.from_pretrained(folder)
