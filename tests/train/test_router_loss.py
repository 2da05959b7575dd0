"""The router's losses under transformers' Trainer and TRL's, against one plain computation."""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from pathlib import Path

from moellava.train.router_loss import use_router_loss
from tests.processes import run_worker
from tests.train import trainers
from tests.train.trainers import NAMES, plain_gradients


@pytest.fixture(scope="module")
def two_processes(made_once):
    worker = Path(__file__).with_name("trainers.py")
    return made_once("trainers-two", lambda folder: run_worker(worker, folder))


def assert_stepped_as_plainly(name, tiny, seen, batches):
    expected = plain_gradients(name, tiny, batches)
    num_compared = 0
    for key, gradient in expected.items():
        if gradient is None:
            continue
        step = seen["start"][key] - seen["end"][key]
        torch.testing.assert_close(
            step, gradient, rtol=1e-3, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
        num_compared += "mlp.gate" in key and bool(step.abs().max() > 1e-4)
    assert num_compared == 2  # both routers


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_accumulated_and_padded_batches(name, tiny, tmp_path):
    seen = trainers.run(name, tiny, tmp_path)
    assert len(seen["batches"]) == 2
    assert any((batch["attention_mask"] == 0).any() for batch in seen["batches"])
    assert_stepped_as_plainly(name, tiny, seen, seen["batches"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes(name, two_processes):
    first, second = (
        torch.load(two_processes / f"{name}.{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert len(first["batches"]) == len(second["batches"]) == 1
    assert not torch.equal(first["batches"][0]["labels"], second["batches"][0]["labels"])
    batches = [*first["batches"], *second["batches"]]
    for seen in (first, second):
        assert_stepped_as_plainly(name, two_processes / "tiny", seen, batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_without_the_remedy_trl_has_another_loss(name, tiny, tmp_path):
    """As docs/other_trainers.md says: transformers' loss, about k = 2 times ours, no z-loss."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    seen = trainers.run(name, tiny, tmp_path, remedy=False)
    with pytest.raises(AssertionError, match=r"mlp\.gate"):
        gates_only(name, tiny, seen)
    model = trainers.build(tiny).model
    with torch.no_grad():
        values = []
        for batch in seen["batches"]:
            given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
            outputs = model(**given, output_router_logits=True)
            own = load_balancing_loss_func(outputs.router_logits, 4, 2, batch["attention_mask"])
            values.append((float(own), float(outputs.aux_loss)))
    theirs, ours = (sum(column) / len(values) for column in zip(*values, strict=True))
    assert seen["log"]["aux_loss"] == pytest.approx(theirs, rel=1e-3)
    assert 1.5 * ours < theirs < 2.5 * ours


def gates_only(name, tiny, seen):
    expected = plain_gradients(name, tiny, seen["batches"])
    for key, gradient in expected.items():
        if "mlp.gate" in key:
            step = seen["start"][key] - seen["end"][key]
            torch.testing.assert_close(step, gradient, rtol=1e-2, atol=1e-5, msg=key)


def test_a_trainer_that_needs_no_remedy_is_refused(tiny, tmp_path):
    trainer = trainers.make_transformers(trainers.build(tiny), tmp_path, 1)
    with pytest.raises(ValueError, match=r"but Trainer is none. transformers' own Trainer needs"):
        use_router_loss(trainer)


def test_without_a_coefficient_trl_adds_nothing(tiny, tmp_path):
    loaded = trainers.build(tiny)
    loaded.model.config.text_config.router_aux_loss_coef = 0.0
    trainer = trainers.make_sft(loaded, tmp_path, 1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0, so TRL adds no router loss"):
        use_router_loss(trainer)
