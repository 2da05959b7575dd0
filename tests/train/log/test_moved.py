"""How far parts moved, against checksums and norms of the saved models."""

import json

import pytest
import torch

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.storage.weights import weights_fingerprint
from moellava.train.log.moved import movement, movement_text
from moellava.train.parts import part_of
from tests.train.tiny import parts_of, tiny_recipe


def by_part(model):
    parts = {}
    for name, weight in model.named_parameters():
        parts.setdefault(part_of(name), {})[name] = weight.detach()
    return parts


@pytest.mark.parametrize(
    ("stage", "learned"),
    [("align", {"projector"}), ("tune", {"projector", "embeddings", "attention", "mlp", "norms"})],
)
def test_the_log_of_a_run_agrees_with_checksums_and_norms(stage, learned, chain, tiny):
    start = chain / "align" / "model" if stage == "tune" else parts_of(tiny)
    options = {} if stage == "tune" else {"moe_config": False}
    before = by_part(load_pretrained_model(start, dtype="float32", **options).model)
    after = by_part(load_pretrained_model(chain / stage / "model", dtype="float32").model)
    rows = json.loads((chain / stage / "log.json").read_text())[-1]["moved"]
    assert [row["part"] for row in rows] == list(before)
    for row in rows:
        old, new = before[row["part"]], after[row["part"]]
        same = str(weights_fingerprint(old)) == str(weights_fingerprint(new))
        assert (row["moved"] == 0) == same == (row["part"] not in learned)
        assert row["learning"] == (row["weights"] if row["part"] in learned else 0)
        flat_old, flat_new = (
            torch.cat([weight.flatten() for weight in weights.values()]) for weights in (old, new)
        )
        expected = float((flat_new - flat_old).norm() / flat_old.norm())
        assert row["moved"] == pytest.approx(expected, rel=1e-4)


def test_the_start_of_experts_is_the_mixture_that_the_dense_model_became(chain):
    """Experts are compared with their copies, not with weights that the start does not have."""
    rows = json.loads((chain / "experts" / "log.json").read_text())[-1]["moved"]
    moved = {row["part"]: row["moved"] for row in rows}
    assert {part for part, far in moved.items() if far} == {"experts", "router"}
    assert moved["experts"] < 1


def test_what_learned_and_did_not_move_is_named(caplog):
    weights = {"model.multi_modal_projector.0.weight": torch.ones(2, 2)}
    rows = movement(weights.items(), weights, {"projector": 4})
    assert rows == [{"part": "projector", "weights": 4, "learning": 4, "moved": 0.0}]
    assert "projector learned, and is bit for bit what it was" in caplog.text
    assert movement_text(rows).splitlines()[1].split() == ["projector", "4", "4", "0"]


def test_a_part_that_began_at_zero_has_moved_its_whole_length():
    name = "model.multi_modal_projector.0.weight"
    rows = movement([(name, torch.zeros(2))], {name: torch.ones(2)}, {"projector": 2})
    assert rows[0]["moved"] == 1.0


def test_a_model_without_the_weight_is_an_error():
    with pytest.raises(ValueError, match=r"multi_modal_projector.0.weight \(2,\) is not in"):
        movement([("model.multi_modal_projector.0.weight", torch.ones(2))], {}, {})


def test_the_command_prints_the_table(tiny, tmp_path, monkeypatch):
    import yaml
    from typer.testing import CliRunner

    from moellava.cli import app
    from moellava.train.options import recipe_to_dict

    recipe = tiny_recipe(tiny, "align", tmp_path / "out", "optim.max_steps=1", "optim.warmup=0")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    said = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")]).stdout.splitlines()
    table = [line.split() for line in said if line.startswith(("vision_tower", "projector"))]
    assert [row[0] for row in table] == ["vision_tower", "projector"]
    assert table[0][2:] == ["0", "0"]
    assert float(table[1][3]) > 0
