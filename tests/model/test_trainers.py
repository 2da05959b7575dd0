"""One step of other people's trainers: transformers' Trainer and TRL's SFTTrainer."""

import pytest
import torch

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model


@pytest.fixture
def own(parts):
    return load_pretrained_model(parts, dtype="float32")


def rows(images):
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "images": [image.convert("RGB")],
        }
        for image, answer in zip(images, ("tissue", "a retina"), strict=False)
    ]


def arguments(make, folder, **options):
    return make(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3,
        report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, remove_unused_columns=False,
        disable_tqdm=True, **options,
    )  # fmt: skip


def trained_names(before, model):
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def assert_everything_but_the_towers_tail_learned(before, model):
    names = trained_names(before, model)
    for part in (
        "vision_tower",
        "multi_modal_projector",
        "experts.gate_up_proj",
        "mlp.gate.weight",
        "lm_head",
    ):
        assert any(part in name for name in names), part


def test_one_step_of_the_trainer(own, images, tmp_path):
    from transformers import Trainer, TrainingArguments

    chats = [
        {
            "messages": [
                {**row["messages"][0], "content": [{"type": "image", "image": row["images"][0]}]},
                row["messages"][1],
            ]
        }
        for row in rows(images[:2])
    ]
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    trainer = Trainer(
        own.model,
        args=arguments(TrainingArguments, tmp_path),
        train_dataset=chats,
        data_collator=ChatCollator(own.processor),
        processing_class=own.processor,
    )
    assert trainer.train().training_loss > 0
    assert_everything_but_the_towers_tail_learned(before, own.model)
    trainer.save_model(str(tmp_path / "saved"))
    again = load_pretrained_model(tmp_path / "saved")
    state = own.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_one_step_of_trls_sft_trainer_on_a_two_row_image_dataset(
    own, images, tmp_path, assistant_only_loss
):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    options = {"max_length": None, "assistant_only_loss": assistant_only_loss}
    trainer = trl.SFTTrainer(
        own.model,
        args=arguments(trl.SFTConfig, tmp_path, **options),
        train_dataset=datasets.Dataset.from_list(rows(images[:2])),
        processing_class=own.processor,
    )
    assert trainer.train().training_loss > 0
    assert_everything_but_the_towers_tail_learned(before, own.model)
