"""What the trainer computes, logs and keeps; oracles are transformers and counting by hand."""

import json

import pytest
import torch

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import train
from moellava.train.trainer import MoeLlavaTrainer
from tests.train.tiny import experts_recipe, losses, model_weights, parts_of, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.slow
def test_eight_rows_are_learned_by_heart(tiny, tmp_path):
    rows = json.loads((tiny / "rows.json").read_text())[:8]
    (tmp_path / "eight.json").write_text(json.dumps(rows))
    data = {"train": str(tmp_path / "eight.json"), "images": str(tiny / "images"), "num_workers": 0}
    recipe = tiny_recipe(
        tiny,
        "tune",
        tmp_path / "out",
        "optim.max_steps=80",
        "optim.batch_size=8",
        "optim.per_device_batch_size=8",
        "optim.learning_rate=2e-2",
        "saving.every=1000",
        data=data,
    )
    assert losses(train(recipe, show_progress=False))[-1] < 0.05


def test_the_loss_of_a_collated_batch_equals_llavas(tmp_path, hub_cache):
    """transformers' LLaVA with the same CLIP and Llama, on our collator's batch."""
    from PIL import Image

    from moellava.testing import OPENAI_CLIP, TINYLLAMA

    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": OPENAI_CLIP}
    loaded = load_pretrained_model(parts, moe_config=False, dtype="float32")
    llava = as_llava(loaded)
    image = Image.linear_gradient("L").convert("RGB")
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image},
                {"type": "text", "text": "Is this a CT?"},
            ],
        },
        {"role": "assistant", "content": "no"},
    ]
    batch = ChatCollator(loaded.processor)(
        [{"messages": chat}, {"messages": [chat[1] | {"role": "user"}, chat[1]]}]
    )
    torch.testing.assert_close(loaded.model(**batch).loss, llava(**batch).loss)


def as_llava(loaded):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = loaded.model.config
    tower = loaded.model.model.vision_tower
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.tower.config,
            text_config=config.text_config,
            image_token_index=config.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    inner = llava.model
    inner.vision_tower.load_state_dict(tower.tower.state_dict())
    inner.language_model.load_state_dict(loaded.model.model.language_model.state_dict())
    names = {"0": "linear_1", "2": "linear_2"}
    projector = loaded.model.model.multi_modal_projector.state_dict()
    inner.multi_modal_projector.load_state_dict(
        {
            f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value
            for key, value in projector.items()
        }
    )
    llava.lm_head.load_state_dict(loaded.model.lm_head.state_dict())
    return llava.eval()


def test_accumulated_gradients_equal_the_large_batchs(tiny, tmp_path):
    large = train(
        tiny_recipe(tiny, "tune", tmp_path / "large", "optim.max_steps=3"), show_progress=False
    )
    small = train(
        tiny_recipe(
            tiny, "tune", tmp_path / "small", "optim.max_steps=3", "optim.per_device_batch_size=1"
        ),
        show_progress=False,
    )
    assert losses(small) == pytest.approx(losses(large), rel=1e-5)
    for ours, theirs in zip(
        model_weights(small).values(), model_weights(large).values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


PLAIN = (
    "optim.max_steps=3",
    "data.group_by_length=false",
    "moe.config.router_aux_loss_coef=0",
    "optim.schedule=constant",
    "optim.warmup=0",
)


@pytest.fixture(scope="module")
def plain(tiny, dense, tmp_path_factory):
    recipe = experts_recipe(tiny, dense, tmp_path_factory.mktemp("plain") / "out", *PLAIN)
    return train(recipe, show_progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        ["optim.precision=bf16", "optim.activation_checkpointing=true"],
        ["optim.precision=bf16_weights"],
        ["data.packing=true", "data.group_by_length=false"],
        ["data.num_workers=2"],
    ],
    ids=["bf16 and checkpointing", "bf16 weights", "packing", "workers"],
)
def test_the_first_losses_are_those_of_plain_training_in_every_mode(
    settings, tiny, dense, plain, tmp_path
):
    result = train(
        experts_recipe(tiny, dense, tmp_path / "out", *settings, *PLAIN), show_progress=False
    )
    tolerance = 2e-2 if "precision" in settings[0] else 1e-4
    assert losses(result) == pytest.approx(losses(plain), rel=tolerance)
    assert losses(plain)[2] < losses(plain)[0] - 0.2


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(tiny, tmp_path):
    """Four rows, so that each step has one shape and is compiled once."""
    (tmp_path / "four.json").write_text(
        json.dumps(json.loads((tiny / "rows.json").read_text())[:4])
    )
    settings = (f"data.train={tmp_path / 'four.json'}", "optim.max_steps=2", *PLAIN[1:2])
    compiled = ("optim.compile=true", "trainer.torch_compile_backend=eager")
    found, expected = (
        losses(
            train(tiny_recipe(tiny, "tune", tmp_path / name, *settings, *more), show_progress=False)
        )
        for name, more in (("compiled", compiled), ("plain", ()))
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_tensorboard_gets_each_experts_load(tiny, dense, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = experts_recipe(
        tiny,
        dense,
        tmp_path / "out",
        "logging.report_to=[tensorboard]",
        "optim.max_steps=2",
        "trainer.run_name=a",
    )
    result = train(recipe, show_progress=False)
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    tag = "train/load_image/layer0_expert1"
    assert tag in board.Tags()["scalars"]
    logged = [entry["load"]["image"][0][1] for entry in result.log if "load" in entry]
    assert [point.value for point in board.Scalars(tag)] == pytest.approx(logged, abs=1e-6)


def test_nan_stops_with_the_layer_and_rows_and_keeps_the_last_good_checkpoint(
    tiny, dense, tmp_path, monkeypatch
):

    own, seen = MoeLlavaTrainer.compute_loss, []

    def spoil(self, model, inputs, *args, **kwargs):
        seen.append(inputs["row_ids"])
        if self.state.global_step == 5:
            weight = self.loaded.model.model.language_model.layers[1].self_attn.v_proj.weight
            weight.data.mul_(float("inf"))
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MoeLlavaTrainer, "compute_loss", spoil)
    recipe = experts_recipe(tiny, dense, tmp_path / "out")
    with pytest.raises(FloatingPointError, match="The loss of step 6 is not finite") as caught:
        train(recipe, show_progress=False)
    message = str(caught.value)
    assert (
        "The weights model.language_model.layers.1.self_attn.v_proj.weight are not finite"
        in message
    )
    assert str(seen[-1]) in message
    assert "The last good checkpoint is checkpoint-4" in message
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert not (tmp_path / "out" / "model").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    tiny, dense, tmp_path, monkeypatch
):
    """Two batches are accumulated: the rows of both are named."""

    own, trainers = MoeLlavaTrainer._clip_grad_norm, []

    def spoil(self, model):
        trainers.append(self)
        self.loaded.model.model.language_model.layers[0].mlp.gate.weight.grad[0, 0] = float("nan")
        return own(self, model)

    monkeypatch.setattr(MoeLlavaTrainer, "_clip_grad_norm", spoil)
    with pytest.raises(
        FloatingPointError,
        match=r"The gradient of step 1 is not finite. The gradients of model.*"
        r"layers.0.mlp.gate.weight, .* are not finite. "
        r"Rows of the batch: \['row\d+'(, 'row\d+'){3}\]",
    ):
        train(
            experts_recipe(tiny, dense, tmp_path / "out", "optim.per_device_batch_size=2"),
            show_progress=False,
        )
    assert all(weight.isfinite().all() for weight in trainers[0].loaded.model.parameters())


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_batch_without_an_image_trains_the_projector_by_nothing(packing, tiny, tmp_path):
    """Stage 1: rows 0 and 4 have no image; of batches of one row, theirs change nothing."""
    rows = json.loads((tiny / "rows.json").read_text())
    (tmp_path / "mixed.json").write_text(json.dumps([rows[0], rows[1], rows[4], rows[2]]))
    settings = [f"data.train={tmp_path / 'mixed.json'}", f"data.packing={packing}"]
    settings += ["optim.batch_size=1", "optim.per_device_batch_size=1", "optim.max_steps=4"]
    result = train(tiny_recipe(tiny, "align", tmp_path / "out", *settings), show_progress=False)
    norms = sorted(entry["grad_norm"] for entry in result.log if "grad_norm" in entry)
    assert norms[:2] == [0, 0]
    assert norms[2] > 0
    (tmp_path / "text.json").write_text(json.dumps([rows[0], rows[4]]))
    settings[0] = f"data.train={tmp_path / 'text.json'}"
    train(tiny_recipe(tiny, "align", tmp_path / "text", *settings), show_progress=False)


def test_gradients_come_in_the_same_order_without_an_image(tiny, tmp_path, monkeypatch):
    """DeepSpeed's ZeRO-2 adds up what the processes have in the order in which it comes."""
    orders, own = {}, MoeLlavaTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        order, has_image = [], "pixel_values" in inputs
        handles = [
            weight.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
            for name, weight in self.loaded.model.named_parameters()
            if weight.requires_grad
        ]
        loss = own(self, model, inputs, *args, **kwargs)
        for handle in handles:
            handle.remove()
        orders[has_image] = order
        return loss

    monkeypatch.setattr(MoeLlavaTrainer, "training_step", training_step)
    settings = ["optim.batch_size=1", "optim.per_device_batch_size=1", "optim.max_steps=8"]
    train(tiny_recipe(tiny, "tune", tmp_path / "out", *settings), show_progress=False)
    assert len(orders[True]) > 10
    assert orders[True] == orders[False]


def test_a_text_batch_of_a_model_that_merges_tiles_trains(tiny, tmp_path):
    tiling = {"max_tiles": 4, "merge": "joint"}
    model = {**parts_of(tiny), "projector_type": "perceiver", "tiling": tiling}
    settings = ["optim.batch_size=1", "optim.per_device_batch_size=1", "optim.max_steps=8"]
    result = train(
        tiny_recipe(tiny, "align", tmp_path / "out", *settings, model=model), show_progress=False
    )
    assert len(losses(result)) == 8
