"""Each stage changes what it says it changes, and starts from what it says it starts from."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import train
from moellava.train.prepare import prepare_model
from moellava.train.trainable import set_trainable
from tests.train.tiny import parts_of, tiny_recipe


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def chain(tiny, tmp_path_factory, quick_runs):
    """The three stages, a few steps each, every one from the folder of the one before."""
    root = tmp_path_factory.mktemp("chain")
    more = {"data": {"train": str(tiny / "rows.json"), "images": str(tiny / "images"), "num_workers": 0,
                     "evaluation": str(tiny / "rows.json")},
            "evaluation": {"every": 2, "num_rows": 6, "num_answers": 2}}  # fmt: skip
    short = ("optim.max_steps=4",)
    align = tiny_recipe(
        tiny,
        "align",
        root / "align",
        *short,
        after=None,
        model=parts_of(tiny),
        start_from=None,
        **more,
    )
    tune = tiny_recipe(tiny, "tune", root / "tune", *short, start_from=str(root / "align"), **more)
    moe = {"config": {"num_experts": 4, "moe_layers": [1], "router_aux_loss_coef": 0.1}}
    experts = tiny_recipe(
        tiny, "experts", root / "experts", *short, start_from=str(root / "tune"), moe=moe, **more
    )
    for recipe in (align, tune, experts):
        train(recipe, show_progress=False)
    return root


def test_experts_can_start_from_the_published_parts(tiny):
    recipe = tiny_recipe(tiny, "experts", tiny / "never", moe={"config": {"num_experts": 3}})
    model, _ = prepare_model(recipe)
    assert model.config.text_config.num_experts == 3


def test_stage_1_changes_the_projector_and_nothing_else(chain, tiny):
    untouched = load_pretrained_model(
        parts_of(tiny), moe_config=False, dtype="float32"
    ).model.state_dict()
    projector = {name for name in untouched if name.startswith("model.multi_modal_projector.")}
    assert changed(untouched, weights(chain / "align")) == projector


def test_stage_2_changes_language_model_and_projector_but_not_the_tower(chain):
    names = changed(weights(chain / "align"), weights(chain / "tune"))
    assert not any(name.startswith("model.vision_tower.") for name in names)
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == {
        "multi_modal_projector",
        "language_model",
    }


def test_stage_3_changes_experts_and_routers_and_nothing_else(chain):
    dense, mixture = weights(chain / "tune"), weights(chain / "experts")
    shared = dense.keys() & mixture.keys()
    assert not changed(
        {name: dense[name] for name in shared}, {name: mixture[name] for name in shared}
    )
    prefix = "model.language_model.layers.1.mlp"
    assert mixture.keys() - shared == {
        f"{prefix}.gate.weight", f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj",
    }  # fmt: skip
    copies = torch.cat([dense[f"{prefix}.gate_proj.weight"], dense[f"{prefix}.up_proj.weight"]])
    assert not any(
        torch.equal(expert, copies) for expert in mixture[f"{prefix}.experts.gate_up_proj"]
    )


def test_a_run_leaves_its_recipe_log_and_history(chain):
    run = chain / "experts"
    assert {"recipe.yaml", "log.json", "model"} <= {path.name for path in run.iterdir()}
    history = json.loads((run / "model" / "training.json").read_text())["stages"]
    assert [entry["stage"] for entry in history] == ["align", "tune", "experts"]
    assert str(chain) not in "".join(path.read_text() for path in (run / "model").glob("*.json"))


def test_each_step_logs_losses_loads_speed_and_memory(chain):
    log = json.loads((chain / "experts" / "log.json").read_text())
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for entry in steps:
        assert {
            "loss",
            "aux_loss",
            "tokens_per_second",
            "memory_mib",
            "grad_norm",
            "learning_rate",
        } <= entry.keys()
        for kind in ("image", "text"):
            (layer,) = entry["load"][kind]
            assert entry["load"]["layers"] == [1]
            assert sum(layer) == pytest.approx(1, abs=1e-3)
            assert len(layer) == 4


def test_the_picture_names_the_sparse_layers_by_their_index(chain, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from moellava.train.log.picture import save_picture

    drawn = []
    own = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **more: (drawn.append(self), own(self, *args, **more)),
    )
    save_picture(
        json.loads((chain / "experts" / "log.json").read_text()), tmp_path / "p.png", title="t"
    )
    assert (tmp_path / "p.png").stat().st_size > 10_000
    layers = [axis for axis in drawn[0].axes if axis.get_ylabel() == "layer"]
    assert [[label.get_text() for label in axis.get_yticklabels()] for axis in layers] == [
        ["1"],
        ["1"],
    ]


def test_evaluation_logs_the_held_out_loss_and_answers(chain, tiny):
    log = json.loads((chain / "tune" / "log.json").read_text())
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 2, 4]
    answers = [entry["answers"] for entry in log if "answers" in entry]
    assert len(answers) == 3
    for answer, row in zip(
        answers[0], json.loads((tiny / "rows.json").read_text())[:2], strict=True
    ):
        question, truth = (turn["value"] for turn in row["conversations"])
        assert answer.keys() == {"id", "question", "answer", "truth"}
        assert (answer["id"], answer["truth"]) == (row["id"], truth)
        assert answer["question"].strip() == question.removeprefix("<image>").strip()


def test_the_logged_held_out_loss_is_the_models_own(chain, tiny):
    """By hand, row by row, on the saved model: the Trainer's mean over batches of 4 and 2."""
    from moellava.data import read_rows
    from moellava.data.collate import ChatCollator

    loaded = load_pretrained_model(chain / "experts" / "model", dtype="float32")
    rows = read_rows(str(tiny / "rows.json"), images=tiny / "images")
    losses = []
    for rows_of_batch in ([rows[i] for i in range(4)], [rows[4], rows[5]]):
        with torch.no_grad():
            losses.append(loaded.model(**ChatCollator(loaded.processor)(rows_of_batch)).loss.item())
    logged = [
        e["eval_loss"]
        for e in json.loads((chain / "experts" / "log.json").read_text())
        if "eval_loss" in e
    ][-1]
    assert logged == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=1e-5)


def test_a_finished_run_is_not_trained_again(chain, tiny):
    recipe = tiny_recipe(tiny, "tune", chain / "tune")
    with pytest.raises(ValueError, match=r"another recipe \(.*start_from.*another output_dir"):
        train(recipe, show_progress=False)


@pytest.mark.parametrize(
    ("stage", "start", "message"),
    [
        ("tune", None, r"Stage 'tune' starts from a finished 'align' stage: set start_from"),
        ("experts", "align", r"'tune', but .* made by stage 'align'. What is missing: moellava train stage2_tune"),
        ("tune", "tune", r"is made by stage 'tune'.*To start from it all the same: after=tune"),
        ("experts", "nowhere", r"is not a folder. Stage 'experts' starts from the output_dir of a finished 'tune' stage"),
    ],
)  # fmt: skip
def test_a_stage_from_the_wrong_start_says_what_is_missing(stage, start, message, chain, tiny):
    start_from = None if start is None else str(chain / start)
    recipe = tiny_recipe(tiny, stage, chain / "wrong", start_from=start_from)
    with pytest.raises((ValueError, OSError), match=message):
        train(recipe, show_progress=False)


def test_a_start_that_has_not_finished_says_so(chain, tiny, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(
        FileNotFoundError, match="only checkpoint-4: that run has not finished; start it again"
    ):
        train(
            tiny_recipe(tiny, "tune", tmp_path / "out", start_from=str(tmp_path)),
            show_progress=False,
        )


def test_a_mixture_cannot_be_upcycled_again(chain, tiny):
    more = {"start_from": str(chain / "experts"), "after": "experts"}
    recipe = tiny_recipe(
        tiny, "experts", chain / "wrong", moe={"config": {"num_experts": 2}}, **more
    )
    with pytest.raises(ValueError, match=r"is a mixture of experts already.*set moe.config=\{\}"):
        prepare_model(recipe)
    model, _ = prepare_model(tiny_recipe(tiny, "experts", chain / "x", **more))
    assert model.model.language_model.layers[1].mlp.experts.gate_up_proj.requires_grad


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["projektor"], r"Unknown part in trainable: 'projektor'. Did you mean 'projector'\?"),
        (
            ["experts"],
            r"trainable names 'experts', but the model has no such weights. It has: vision_tower, projector",
        ),
    ],
)
def test_parts_that_cannot_be_trained_are_named(parts, message, chain):
    model = load_pretrained_model(chain / "tune" / "model").model
    with pytest.raises(ValueError, match=message):
        set_trainable(model, parts)


def test_a_trained_tower_leaves_out_the_blocks_that_do_not_run(chain):
    model = load_pretrained_model(chain / "tune" / "model").model
    set_trainable(model, ["vision_tower"])
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("blocks.0." in name for name in learning)
    last = max(
        int(name.split("blocks.")[1].split(".")[0])
        for name, _ in model.named_parameters()
        if "blocks." in name
    )
    assert not any(f"blocks.{last}." in name for name in learning)
