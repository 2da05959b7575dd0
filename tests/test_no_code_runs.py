"""No file runs code, whatever command or loader opens it, though every prompt is answered "y".

The folders are sound, so that everything is opened, but name code of their own wherever a library
could run it. Folders that only code could open are in tests/encoders/test_no_code_runs.py and
tests/model/test_trust_remote_code.py.
"""

import json
import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from moellava.cli import app
from moellava.data import read_rows
from moellava.encoders.feature_file import FeatureFile
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.model.checkpoint.projector_file import read_projector
from moellava.model.language_model import LlamaMoeConfig
from moellava.model.language_model.router_weights import read_router
from moellava.testing import write_biomedclip
from moellava.train import load_recipe, train
from tests.experiment.tiny import experiment_settings
from tests.train.tiny import parts_of, tiny_recipe, write_tiny

CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoImageProcessor",
)
AUTO_MAP = {
    **dict.fromkeys(CLASSES, "trap.Trap"),
    "AutoTokenizer": ["trap.Trap", "trap.Trap"],
}
PICKLES = ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "extra.pt")
# Runs in a template that is not in a sandbox.
TEMPLATE = (
    "{{% if cycler %}}{{{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}}}{{% endif %}}"
)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """Made by any code that runs; whoever asks on the terminal hears "y", twenty times."""
    answers = ["y"] * 20
    monkeypatch.setattr("builtins.input", lambda *_: answers.pop() if answers else end_input())
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def end_input() -> str:
    raise EOFError


def arm(folder: Path, marker: Path) -> Path:
    """Code in a folder of any kind, and its name in every file that can name code."""
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Trap: pass\n"
    for name in ("trap.py", f"{folder.name}.py", "conftest.py", "setup.py"):
        (folder / name).write_text(code)
    for path in folder.glob("*config.json"):
        if path.name != "open_clip_config.json":
            settings = json.loads(path.read_text())
            more = {"auto_map": AUTO_MAP, "trust_remote_code": True}
            path.write_text(json.dumps(settings | more))
    for name in PICKLES:
        if not (folder / name).exists():
            torch.save({"x": Trap(marker)}, folder / name)
    return folder


@pytest.fixture(scope="module")
def sound(hub_cache, tmp_path_factory) -> Path:
    """A folder of each kind: parts, rows, a saved model, a difference with an adapter."""
    home = write_tiny(tmp_path_factory.mktemp("sound") / "home", num_rows=4)
    shutil.rmtree(home / "biomedclip_tiny")
    write_biomedclip(home / "biomedclip_tiny", vision="test_vit", image_size=32)
    loaded = load_pretrained_model(parts_of(home))
    loaded.model.save_pretrained(home / "saved")
    loaded.processor.save_pretrained(home / "saved")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(loaded.model, peft.LoraConfig(target_modules=["q_proj"]))
    save_trainable(adapted, home / "difference", processor=loaded.processor)
    return home


@pytest.fixture
def armed(sound, tmp_path, marker, monkeypatch) -> Path:
    home = Path(shutil.copytree(sound, tmp_path / "home"))
    for name in ("biomedclip_tiny", "tinyllama_tiny", "saved", "difference", "difference/adapter"):
        arm(home / name, marker)
    monkeypatch.chdir(home)
    return home


MODEL, TOWER, LLAMA = "saved", "biomedclip_tiny", "tinyllama_tiny"
IMAGE, ROWS = "images/1.png", ["rows.json", "--images", "images"]
COMMANDS: dict[str, list[str] | None] = {
    "demo": None,  # opens only what it has written itself
    "ask": [MODEL, IMAGE, "What is this?", "--max-new-tokens", "1"],
    "chat": [MODEL, IMAGE, "--max-new-tokens", "1"],
    "serve": [MODEL, "--port", "18080"],
    "train": ["recipe.yaml"],
    "verify": ["--tower", TOWER, "--language-model", LLAMA],
    "encode": ["images", "--encoder", TOWER, "--out", "out.safetensors"],
    "classify": [IMAGE, "--labels", "CT,MR", "--encoder", TOWER],
    "encoders show": [TOWER],
    "data check": [*ROWS, "--tokenizer", LLAMA],
    "data convert": [*ROWS, "out.jsonl"],
    "explain answer": [MODEL, IMAGE, "What?", "--answer", "A CT.", "--no-ablation", "--out", "o"],
    "explain routing": [MODEL, *ROWS, "--group-by", "modality", "--out", "out"],
    "eval run": [MODEL, *ROWS, "--out", "out", "--max-new-tokens", "1", "--resamples", "2"],
    "eval score": ["predictions.jsonl"],
    "eval compare": ["predictions.jsonl", "predictions.jsonl"],
    "eval lmms-tasks": None,  # prints a folder
    "integrations": None,  # prints a file of the package
    "experiment": ["experiment.yaml", "--dry-run"],  # what it trains are recipes, as above
    "export mixtral": [MODEL, "--out", "mixtral"],
    "export onnx": [MODEL, "--out", "onnx"],
    "web": [MODEL, "--port", "18081"],
}


def command_names(command: object, before: str = "") -> list[str]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [before]
    return [
        name
        for word, one in inner.items()
        for name in command_names(one, f"{before} {word}".strip())
    ]


def test_no_command_is_left_out():
    assert sorted(command_names(typer.main.get_command(app))) == sorted(COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name] is not None])
def test_a_command_runs_no_code_of_the_files_that_it_opens(armed, name):
    (armed / "recipe.yaml").write_text(
        "stage: tune\noutput_dir: run\nafter: any\nstart_from: saved\n"
        "data: {train: rows.json, images: images, num_workers: 0}\nlogging: {report_to: []}\n"
        "optim: {max_steps: 1, batch_size: 2, per_device_batch_size: 2, precision: fp32}\n"
    )
    (armed / "predictions.jsonl").write_text(
        '{"id": "a", "answer": "yes", "truth": "yes", "answer_type": "closed"}\n'
    )
    experiment = experiment_settings(Path(), "runs")
    (armed / "experiment.yaml").write_text(json.dumps(experiment))
    served = mock.patch("moellava.chat.server.serve"), mock.patch("moellava.chat.web.app.serve_web")
    with served[0], served[1]:
        result = CliRunner().invoke(app, [*name.split(), *COMMANDS[name]], input="y\n" * 20)
    allowed = (0, 1) if name == "data check" else (0,)  # 1: two rows of a kind in the tiny set
    assert result.exit_code in allowed, result.output + result.stderr


def write_pickle(folder: Path, marker: Path) -> Path:
    torch.save({"0.weight": Trap(marker)}, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


def write_old_pickle(folder: Path, marker: Path) -> Path:
    (folder / "router.pth").write_bytes(pickle.dumps({"weight": Trap(marker)}))
    return folder / "router.pth"


def write_arrays(folder: Path, marker: Path) -> Path:
    images = np.empty(2, dtype=object)
    images[:] = Trap(marker)
    np.savez(folder / "set.npz", train_images=images, train_labels=images)
    return folder / "set.npz"


def write_yaml(folder: Path, marker: Path) -> Path:
    (folder / "a.yaml").write_text(f"stage: !!python/object/apply:os.mkdir ['{marker}']\n")
    return folder / "a.yaml"


def write_script(folder: Path, marker: Path) -> Path:
    """A data set as the hub had them: a script that loads it."""
    (folder / "set").mkdir()
    arm(folder / "set", marker)
    return folder / "set"


def write_pickled_rows(folder: Path, marker: Path) -> Path:
    (folder / "rows.pkl").write_bytes(pickle.dumps([Trap(marker)]))
    return folder / "rows.pkl"


LOADERS = {
    "projector": (write_pickle, read_projector),
    "router": (write_old_pickle, lambda path: read_router(path, LlamaMoeConfig(num_experts=4))),
    "features": (write_old_pickle, FeatureFile),
    "arrays": (write_arrays, lambda path: read_rows(path, class_names=["a", "b"])),
    "pickled rows": (write_pickled_rows, read_rows),
    "loading script": (write_script, read_rows),
    "recipe": (write_yaml, load_recipe),
    "description": (write_yaml, load_pretrained_model),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_is_code_is_refused(tmp_path, marker, name):
    write, read = LOADERS[name]
    with pytest.raises((ValueError, OSError)):
        read(write(tmp_path, marker))


def test_a_difference_with_an_adapter(armed, marker):
    parts = parts_of(armed)
    load_trainable(armed / "difference", base=parts)
    (armed / "difference" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="adapter"):  # there is a pickle beside it
        load_trainable(armed / "difference", base=parts)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_runs_in_a_sandbox(armed, marker, name):
    template, path = TEMPLATE.format(marker=marker), armed / MODEL / name
    if name.endswith(".json"):
        (armed / MODEL / "chat_template.jinja").unlink()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    else:
        path.write_text(template)
    with pytest.raises(ValueError, match="chat template"):
        load_pretrained_model(armed / MODEL).answer(None, "What?", max_new_tokens=1)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_state_of_a_run(sound, tmp_path, marker, name):
    recipe = tiny_recipe(sound, "tune", tmp_path / "run", "optim.max_steps=4")
    stop = mock.patch("moellava.train.gradient_steps.finish", side_effect=KeyboardInterrupt)
    with stop, pytest.raises(KeyboardInterrupt):
        train(recipe, show_progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    torch.save({"x": Trap(marker)}, tmp_path / "run" / "checkpoint-2" / name)
    with pytest.raises((ValueError, OSError), match="checkpoint-2"):
        train(recipe, show_progress=False)


def test_the_traps_would_work(tmp_path):
    """The oracles can say no: unpickled, and rendered without a sandbox."""
    import jinja2

    pickle.loads(pickle.dumps(Trap(tmp_path / "pickle")))
    jinja2.Template(TEMPLATE.format(marker=tmp_path / "template")).render()
    assert (tmp_path / "pickle").exists()
    assert (tmp_path / "template").exists()
