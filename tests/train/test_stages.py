"""Each stage changes what it says it changes, and starts from what it says it starts from."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moellava.model.builder_enhanced import load_pretrained_model
from tests.train.tiny import parts_of


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


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
