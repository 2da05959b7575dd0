"""What the trainer computes, logs, refuses and keeps; oracles are transformers, torch and counting by hand."""

import json

import pytest
import torch

from moellava.data import read_rows
from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import train
from moellava.train.log.router_load import RouterLoad, load_by_name
from moellava.train.order import EpochSampler
from tests.train.tiny import parts_of, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory, quick_runs):
    """A dense model, one step old, to start from."""
    out = tmp_path_factory.mktemp("dense")
    train(tiny_recipe(tiny, "tune", out / "run", "optim.max_steps=1"), show_progress=False)
    return out / "run"


def experts_recipe(tiny, dense, out, *overrides, **more):
    settings = {"start_from": str(dense), "moe": {"config": {"num_experts": 4}}, **more}
    return tiny_recipe(tiny, "experts", out, *overrides, **settings)


def losses(result):
    return [entry["loss"] for entry in result.log if "loss" in entry]


def model_weights(result):
    return load_pretrained_model(result.model_folder).model.state_dict()


@pytest.mark.slow
def test_eight_rows_are_learned_by_heart(tiny, tmp_path):
    rows = json.loads((tiny / "rows.json").read_text())[:8]
    (tmp_path / "eight.json").write_text(json.dumps(rows))
    data = {"train": str(tmp_path / "eight.json"), "images": str(tiny / "images"), "num_workers": 0}
    recipe = tiny_recipe(
        tiny, "tune", tmp_path / "out", "optim.max_steps=80", "optim.batch_size=8", "optim.per_device_batch_size=8",
        "optim.learning_rate=2e-2", "saving.every=1000", data=data,
    )  # fmt: skip
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
            vision_config=tower.tower.config, text_config=config.text_config, image_token_index=config.image_token_id,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )
    )  # fmt: skip
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


def test_a_batch_that_cannot_be_divided_is_refused(tiny, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"optim.batch_size=4 is not a multiple of optim.per_device_batch_size=3 times 1",
    ):
        train(
            tiny_recipe(tiny, "tune", tmp_path / "x", "optim.per_device_batch_size=3"),
            show_progress=False,
        )


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
    ("setting", "error", "message"),
    [
        ("trainer.torch_compil=true", ValueError, r"Did you mean 'trainer.torch_compile'\?"),
        (
            "trainer.learning_rate=1",
            ValueError,
            r"trainer.learning_rate has a key of its own in the recipe",
        ),
        (
            "trainer.save_only_model=true",
            ValueError,
            r"save_only_model would break whole checkpoints or exact resuming",
        ),
        ("logging.report_to=[tensorbord]", ValueError, r"Did you mean 'tensorboard'\?"),
        (
            "logging.report_to=[wandb, mlflow]",
            ImportError,
            r"'wandb', which is not installed. Type: pip install wandb",
        ),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(
    setting, error, message, tiny, tmp_path, monkeypatch
):
    from moellava.train import arguments

    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(error, match=message):
        train(tiny_recipe(tiny, "tune", tmp_path / "x", setting), show_progress=False)


def test_wandb_and_mlflow_are_the_trainers_own_callbacks(tiny, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    from moellava.train import arguments

    monkeypatch.setattr(
        arguments, "get_available_reporting_integrations", lambda: ["wandb", "mlflow"]
    )
    chosen = arguments.training_arguments(
        tiny_recipe(tiny, "tune", tmp_path, "logging.report_to=[wandb, mlflow]")
    )
    found = integration_utils.get_reporting_integration_callbacks(chosen.report_to)
    assert [callback.__name__ for callback in found] == ["WandbCallback", "MLflowCallback"]


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


# Routers


def test_loads_equal_counting_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 3, generator=generator) for _ in range(2)]
    is_image = torch.tensor([[True, True, False], [False, False, False]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    load = RouterLoad(top_k=2, layers=[0, 2])
    load.add(logits, is_image, mask)
    load.add(logits[::-1], is_image, mask)
    found = load.flush(lambda tensor: tensor)
    for kind, wanted in (("image", True), ("text", False)):
        for layer in range(2):
            counts = [0, 0, 0]
            for source in (logits[layer], logits[1 - layer]):
                for token in range(6):
                    row, column = divmod(token, 3)
                    if mask[row, column] and bool(is_image[row, column]) == wanted:
                        for expert in sorted(range(3), key=lambda e: -source[token, e])[:2]:
                            counts[expert] += 1
            assert found[kind][layer] == pytest.approx(
                [count / sum(counts) for count in counts], abs=1e-4
            )
    assert found["layers"] == [0, 2]
    assert load_by_name(found)["load_text/layer2_expert1"] == found["text"][1][1]
    assert load.flush(lambda tensor: tensor) is None


# Order of the rows


@pytest.mark.parametrize("is_grouped", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(is_grouped):
    lengths = [index % 17 for index in range(300)]

    def order(seed, epoch, earlier=()):
        sampler = EpochSampler(
            300, seed=seed, lengths=lengths if is_grouped else None, group_size=4
        )
        for sampler.epoch in (*earlier, epoch):
            found = list(sampler)
        return found

    assert order(0, 2, earlier=(0, 1)) == order(0, 2)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert sorted(order(0, 1)) == list(range(300))
    spread = [max(part) - min(part) for part in batches([lengths[i] for i in order(0, 1)], 4)]
    assert (sum(spread) / len(spread) < 2) == is_grouped  # shuffled: about 10


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


# Bad rows


def test_rows_that_are_too_long_are_named_before_a_step(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"20 of 20 rows have more than data.max_length=10 tokens: 'row0' \(\d+\)"
    ):
        train(tiny_recipe(tiny, "tune", tmp_path / "x", "data.max_length=10"), show_progress=False)


def test_missing_data_is_asked_for(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"names no training data. Add data.train=FILE"):
        train(tiny_recipe(tiny, "tune", tmp_path / "x", "data.train=null"), show_progress=False)


# Never lose work


def test_nan_stops_with_the_layer_and_rows_and_keeps_the_last_good_checkpoint(
    tiny, dense, tmp_path, monkeypatch
):
    from moellava.train.trainer import MoeLlavaTrainer

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


def test_a_nan_that_arises_in_computing_names_the_first_module(tiny, dense, tmp_path, monkeypatch):
    from moellava.train.trainer import MoeLlavaTrainer

    own = MoeLlavaTrainer._init_training_state

    def spoil(self, *args):
        mlp = self.loaded.model.model.language_model.layers[1].input_layernorm
        mlp.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        return own(self, *args)

    monkeypatch.setattr(MoeLlavaTrainer, "_init_training_state", spoil)
    with pytest.raises(
        FloatingPointError,
        match=r"first output .* is that of model.language_model.layers.1.input_layernorm",
    ):
        train(experts_recipe(tiny, dense, tmp_path / "out"), show_progress=False)


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(
    tiny, dense, tmp_path, monkeypatch
):
    """Two batches are accumulated: the rows of both are named."""
    from moellava.train.trainer import MoeLlavaTrainer

    own, trainers = MoeLlavaTrainer._clip_grad_norm, []

    def spoil(self, model):
        trainers.append(self)
        self.loaded.model.model.language_model.layers[0].mlp.gate.weight.grad[0, 0] = float("nan")
        return own(self, model)

    monkeypatch.setattr(MoeLlavaTrainer, "_clip_grad_norm", spoil)
    with pytest.raises(
        FloatingPointError,
        match=r"The gradient of step 1 is not finite. The gradients of model.*"
        r"layers.0.mlp.gate.weight, .* are not finite. Rows of the batch: \['row\d+'(, 'row\d+'){3}\]",
    ):
        train(
            experts_recipe(tiny, dense, tmp_path / "out", "optim.per_device_batch_size=2"),
            show_progress=False,
        )
    assert all(weight.isfinite().all() for weight in trainers[0].loaded.model.parameters())


def test_a_full_disk_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    """The system refuses to let a file grow beyond 100 kB, as it does when a disk is full."""
    import resource

    from moellava.train.trainer import MoeLlavaTrainer

    own, (soft, hard) = MoeLlavaTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, *args):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            return own(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(MoeLlavaTrainer, "_save_checkpoint", limited)
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=5")
    with pytest.raises(
        OSError, match=r"checkpoint-4 could not be written: .*too large.* If"
    ) as caught:
        train(recipe, show_progress=False)
    assert "The last good checkpoint is checkpoint-2" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "out" / ".unfinished").glob("*"))
    monkeypatch.undo()
    result = train(recipe, show_progress=False)  # room again: it goes on
    whole = train(
        tiny_recipe(tiny, "tune", tmp_path / "whole", "optim.max_steps=5"), show_progress=False
    )
    assert losses(result) == losses(whole)


def test_an_error_in_our_own_code_is_not_called_a_full_disk(tiny, tmp_path, monkeypatch):
    from moellava.train.trainer import MoeLlavaTrainer

    monkeypatch.setattr(MoeLlavaTrainer, "_save_scaler", lambda *args: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        train(tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=2"), show_progress=False)


# A frozen tower's features


def test_kept_features_give_the_losses_of_encoding_each_time(tiny, tmp_path):
    recipes = [
        tiny_recipe(tiny, "align", tmp_path / name, *more)
        for name, more in (("each", ()), ("kept", (f"data.features={tmp_path / 'f.safetensors'}",)))
    ]
    each, kept = (train(recipe, show_progress=False) for recipe in recipes)
    assert losses(kept) == pytest.approx(losses(each), rel=1e-5)
    # A second run reads the file; with another tower, the file is refused.
    again = tiny_recipe(
        tiny, "align", tmp_path / "again", f"data.features={tmp_path / 'f.safetensors'}"
    )
    assert losses(train(again, show_progress=False)) == losses(kept)
    other = {**parts_of(tiny), "vision_feature_layer": -1}
    recipe = tiny_recipe(
        tiny,
        "align",
        tmp_path / "other",
        f"data.features={tmp_path / 'f.safetensors'}",
        model=other,
    )
    with pytest.raises(ValueError, match="holds features of select_layer=-2, but the model has -1"):
        train(recipe, show_progress=False)
    tuned = tiny_recipe(
        tiny, "tune", tmp_path / "tower", "optim.max_steps=2", trainable=["vision_tower"]
    )
    train(tuned, show_progress=False)
    settings = (f"data.features={tmp_path / 'f.safetensors'}", "after=any")
    recipe = tiny_recipe(
        tiny, "align", tmp_path / "other", *settings, start_from=str(tmp_path / "tower")
    )
    with pytest.raises(ValueError, match="features of a tower with other weights than the model's"):
        train(recipe, show_progress=False)


# Adapters


@pytest.mark.parametrize("stage", ["tune", "experts"])
def test_adapters_learn_and_are_merged_into_an_ordinary_model(stage, tiny, dense, tmp_path):
    from peft import PeftModel

    lora = {"rank": 4, "alpha": 8}
    if stage == "tune":
        recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.learning_rate=5e-2", lora=lora)
    else:
        recipe = experts_recipe(
            tiny, dense, tmp_path / "out", "optim.learning_rate=5e-2", lora=lora
        )
    result = train(recipe, show_progress=False)
    assert losses(result)[-1] < losses(result)[0] - 0.15
    merged = load_pretrained_model(result.model_folder, dtype="float32")
    rows = read_rows(str(tiny / "rows.json"), images=tiny / "images")
    batch = ChatCollator(merged.processor)([rows[1], rows[2]])
    # PEFT's own reading of the adapter, on the base that it was trained on.
    from moellava.train.prepare import build_model

    base = build_model(recipe).model
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(
            merged.model(**batch).logits, adapted.eval()(**batch).logits, rtol=1e-4, atol=1e-4
        )


def test_adapters_with_checkpointed_activations_have_the_same_losses(tiny, tmp_path):
    plain, checkpointed = (
        losses(
            train(
                tiny_recipe(
                    tiny,
                    "tune",
                    tmp_path / name,
                    "optim.max_steps=3",
                    *more,
                    lora={"rank": 4, "alpha": 8},
                ),
                show_progress=False,
            )
        )
        for name, more in (
            ("plain", ()),
            ("checkpointed", ("optim.activation_checkpointing=true",)),
        )
    )
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_dropout_on_experts_is_refused(tiny, dense, tmp_path):
    with pytest.raises(
        ValueError, match=r"PEFT has no dropout for fused experts. Set lora.dropout=0"
    ):
        train(
            experts_recipe(tiny, dense, tmp_path / "x", lora={"dropout": 0.1}), show_progress=False
        )


# Med-MoE


def test_med_moes_router_learns_modalities_and_stays_frozen_in_its_third_stage(
    tiny, dense, tmp_path
):
    more = {"start_from": str(dense), "moe": {"config": {"num_experts": 4}}}
    router = train(
        tiny_recipe(
            tiny, "router", tmp_path / "router", "optim.epochs=3", "optim.max_steps=null", **more
        ),
        show_progress=False,
    ).model_folder
    assert json.loads((router / "labels.json").read_text()) == ["CT", "MR", "US", "histology"]
    config = {"num_experts_per_tok": 1, "norm_topk_prob": False, "meta_expert": True, "router_bias": True,
              "router_frozen": True, "router_aux_loss_coef": 0.0, "num_experts": 4}  # fmt: skip
    recipe = tiny_recipe(
        tiny, "experts", tmp_path / "experts", start_from=str(dense), trainable=["experts", "meta_expert"],
        moe={"config": config, "keep_function": False, "router": str(tmp_path / "router")},
    )  # fmt: skip
    result = train(recipe, show_progress=False)
    from safetensors.torch import load_file

    fitted, trained = load_file(router / "router.safetensors"), model_weights(result)
    gates = [name for name in trained if name.endswith("mlp.gate.weight")]
    assert gates
    assert all(torch.equal(trained[name], fitted["weight"]) for name in gates)
    assert losses(result)[-1] < losses(result)[0] - 0.5


def test_the_fitted_router_equals_routing_by_averaged_logits(tiny, dense):
    """The mean of the logits over tokens and layers, computed token by token, is the linear layer of the mean."""
    from moellava.train.router_fit import mean_hidden_states

    loaded = load_pretrained_model(dense / "model", dtype="float32")
    rows = read_rows(str(tiny / "rows.json"), images=tiny / "images")
    chosen = [rows[0], rows[1], rows[2]]
    collator = ChatCollator(loaded.processor)
    means = mean_hidden_states(loaded.model, [collator(chosen[:2]), collator(chosen[2:])], [0, 1])
    linear = torch.nn.Linear(means.shape[1], 4)
    inputs = []
    for layer in loaded.model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    for row, mean in zip(chosen, means, strict=True):
        inputs.clear()
        with torch.no_grad():
            batch = collator([row])
            batch.pop("labels")
            loaded.model(**batch)
            logits = torch.cat([linear(tokens[0]) for tokens in inputs])
        torch.testing.assert_close(linear(mean), logits.mean(0), rtol=1e-4, atol=1e-5)


def test_as_many_experts_as_modalities_are_needed(tiny, dense, tmp_path):
    moe = {"config": {"num_experts": 3}}
    recipe = tiny_recipe(
        tiny, "router", tmp_path / "r", "optim.max_steps=null", start_from=str(dense), moe=moe
    )
    with pytest.raises(
        ValueError, match=r"4 modalities \(CT, MR, US, histology\), but moe.config.num_experts is 3"
    ):
        train(recipe, show_progress=False)
