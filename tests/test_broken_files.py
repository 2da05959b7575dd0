"""Every kind of file that the package reads, but images: whatever it holds, the error names it.

Images are in tests/images/test_trust.py, language models alone in
tests/model/language_model/test_mutated_files.py, encoders in tests/encoders/test_broken_files.py.
"""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moellava.data import read_rows
from moellava.model.builder.request import read_build_request
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.adapter import read_adapter
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.model.checkpoint.projector_file import read_projector, save_projector
from moellava.testing import write_biomedclip, write_tinyllama
from moellava.train import Recipe, load_recipe, sharding, train
from moellava.train.arguments import training_arguments
from moellava.train.batches import read_data
from moellava.train.gradient_steps import build_trainer, read_state
from moellava.train.log.history import read_history
from moellava.train.prepare import prepare_model
from moellava.train.run_folder import read_log, require_same_recipe
from moellava.train.trainer import MoeLlavaTrainer
from moellava.train.usable_rows import usable_rows
from tests.mutations import require_named_errors
from tests.train.tiny import tiny_recipe, write_tiny


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
        ("config.json", 30),
        ("generation_config.json", 20),
        ("processor_config.json", 20),
        ("tokenizer_config.json", 20),
        ("tokenizer.json", 20),
        ("chat_template.jinja", 20),
        ("model.safetensors", 20),
    ],
)
def test_a_saved_model(whole, name, count):
    def read() -> None:
        opened = load_pretrained_model(whole)
        if name != "chat_template.jinja":  # any text is one, also one that fills the context
            opened.answer(None, "What?", max_new_tokens=1)

    require_named_errors(whole / name, read, count=count, is_json=name.endswith(".json"))


@pytest.mark.parametrize("name", ["base.json", "trainable.safetensors"])
def test_a_difference(loaded, parts, tmp_path, name):
    save_trainable(loaded, tmp_path / "saved")
    file = tmp_path / "saved" / name
    is_json = name.endswith(".json")
    require_named_errors(
        file, lambda: load_trainable(file.parent, base=parts), count=12, is_json=is_json
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(tmp_path, name):
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    config = LlamaConfig(**sizes, num_attention_heads=2)
    adapted = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / name

    def read() -> None:
        read_adapter(LlamaForCausalLM(config), file.parent)

    require_named_errors(file, read, count=60, is_json=name.endswith(".json"))


def test_a_projector_of_ours(loaded, tmp_path):
    file = save_projector(loaded.model, tmp_path / "saved")
    require_named_errors(file, lambda: read_projector(tmp_path / "saved"), count=60)


def test_a_projector_of_llava(tmp_path):
    (tmp_path / "llava").mkdir()
    file = tmp_path / "llava" / "mm_projector.bin"
    torch.save({"model.mm_projector.weight": torch.ones(4, 3)}, file)
    require_named_errors(file, lambda: read_projector(tmp_path / "llava"), count=60)
    config = tmp_path / "llava" / "config.json"
    config.write_text('{"model_type": "llava_llama", "mm_vision_tower": "openai/x"}')
    require_named_errors(config, lambda: read_projector(tmp_path / "llava"), count=40, is_json=True)


def test_a_description_of_a_model(parts, tmp_path):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(parts | {"select_layer": -2}))
    require_named_errors(file, lambda: read_build_request(file), count=60, is_json=True)


# ---- training


def test_a_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "stage: tune\noutput_dir: run\nmodel: {model_name_or_path: a/b, mm_vision_tower: c/d}\n"
        "data:\n  train: rows.json\n  max_length: 100\noptim:\n  learning_rate: 1e-3\n"
        "lora: {rank: 4, alpha: 8}\nsaving:\n  keep: 2\ntrainable: [projector]\n"
    )
    require_named_errors(file, lambda: load_recipe(file), count=150)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Recipe]:
    """A run whose last checkpoint and model are taken away, so that it resumes from step 1."""
    tiny = write_tiny(tmp_path_factory.mktemp("tiny") / "parts", num_rows=4)
    folder = tiny.parent / "broken-run"
    settings = ("optim.max_steps=2", "saving.every=1", "optim.batch_size=2")
    recipe = tiny_recipe(tiny, "tune", folder, *settings, "optim.per_device_batch_size=2")
    with mock.patch("moellava.train.finish.save_picture"):
        train(recipe, show_progress=False)
    return folder, recipe


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("log.json", lambda run, recipe: read_log(run)),
        ("recipe.yaml", lambda run, recipe: require_same_recipe(recipe, run)),
        ("model/training.json", lambda run, recipe: read_history(run / "model")),
    ],
)
def test_what_a_finished_run_says(run, name, read):
    file = run[0] / name
    require_named_errors(file, lambda: read(*run), count=100, is_json=name.endswith(".json"))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("trainer_state.json", 60),
        ("optimizer.pt", 40),
        ("scheduler.pt", 40),
        ("rng_state.pth", 40),
        ("model.safetensors", 40),
    ],
)
def test_a_checkpoint_to_resume_from(run, resumable, name, count):
    """What is read before the first step, as the Trainer's `train` reads it."""
    checkpoint = run[0] / "checkpoint-1"

    def read() -> None:
        read_state(checkpoint)
        resumable._load_from_checkpoint(str(checkpoint))
        sharding.load_checkpoint(resumable.loaded.model, checkpoint)
        resumable._load_optimizer_and_scheduler(str(checkpoint))
        resumable._load_rng_state(str(checkpoint))

    is_json = name.endswith(".json")
    require_named_errors(checkpoint / name, read, count=count, is_json=is_json)


@pytest.fixture(scope="module")
def resumable(run) -> MoeLlavaTrainer:
    recipe = run[1]
    arguments = training_arguments(recipe, show_progress=False)
    trainer = build_trainer(recipe, arguments, read_data(recipe), *prepare_model(recipe))
    trainer.create_optimizer_and_scheduler(2)
    return trainer


# ---- data sets

TURNS = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}]
ITEMS = [{"type": "image"}, {"type": "text", "text": "Why?"}]
ROWS: dict[str, dict[str, object]] = {
    "llava": {"id": "a", "image": "a.jpg", "conversations": TURNS, "extra_json": '{"b": 1}'},
    "messages": {
        "messages": [{"role": "user", "content": ITEMS}, {"role": "assistant", "content": "So."}],
        "images": ["a.jpg"],
    },
    "questions": {"question_id": 1, "image": "a.jpg", "text": "Why?"},
    "vqa": {"image": {"path": "a.jpg", "bytes": None}, "question": "Why?", "answer": "So."},
    "vqa_rad": {
        "qid": 1, "image_name": "a.jpg", "question": "Why?", "answer": 3, "phrase_type": "freeform",
    },
    "slake": {
        "qid": 1, "q_lang": "en", "img_name": "a.jpg", "question": "Why?", "answer": "So.",
    },
    "pmc_vqa": {
        "Figure_path": "a.jpg", "Question": "Why?", "Answer": "A", "Choice A": " A:b ",
        "Choice B": "b", "Choice C": "c", "Choice D": "d",
    },
    "classification": {"image": "a.jpg", "label": 1},
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("layout", ROWS)
def test_rows_of_each_layout(tmp_path, layout, suffix):
    """The first row is damaged; with `skip_bad` the others are read."""
    file = tmp_path / f"rows.{suffix}"
    rows = [ROWS[layout]] * 3
    lines = [json.dumps(row) for row in rows]
    file.write_text(json.dumps(rows) if suffix == "json" else "\n".join(lines))
    options = {"class_names": ["a", "b"]} if layout == "classification" else {}

    def read() -> None:
        for skip_bad in (False, True):
            found = read_rows(file, format=layout, skip_bad=skip_bad, **options)
            if layout != "questions":  # which have no answers
                found = usable_rows(found, file.name, skip_bad=True, show_progress=False)
            for row in found:
                row.messages()

    with mock.patch("moellava.train.usable_rows._open_header"):
        require_named_errors(file, read, count=40, is_json=suffix == "json")
