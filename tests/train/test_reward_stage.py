"""Reinforcement learning from checkable answers, by TRL's GRPO."""

import json
import shutil

import pytest
import torch

pytest.importorskip("trl")

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import load_recipe, train
from moellava.train.plan import plan
from tests.train.tiny import model_weights, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")

SETTINGS = (
    "optim.max_steps=4",
    "optim.batch_size=8",
    "optim.per_device_batch_size=4",
    "optim.warmup=0",
    "optim.learning_rate=1e-3",
    "reward.num_answers=4",
    "reward.max_new_tokens=4",
    "saving.every=2",
)


def reward_recipe(tiny, chain, out, *overrides, **more):
    return tiny_recipe(
        tiny, "reward", out, *SETTINGS, *overrides, start_from=str(chain / "experts"), **more
    )


@pytest.fixture(scope="module")
def result(tiny, chain, tmp_path_factory):
    more = {
        "data": {
            "train": str(tiny / "rows.json"),
            "images": str(tiny / "images"),
            "num_workers": 0,
            "evaluation": str(tiny / "rows.json"),
        },
        "evaluation": {"every": 2, "num_rows": 4, "num_answers": 2, "scorers": ["strict"]},
        "reward": {"scorers": ["strict", "token_f1"], "format": True},
    }
    out = tmp_path_factory.mktemp("reward") / "out"
    return train(reward_recipe(tiny, chain, out, **more), show_progress=False)


@pytest.mark.slow
def test_the_log_has_rewards_lengths_divergence_load_and_scores(result):
    steps = [entry for entry in result.log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for entry in steps:
        for name in ("strict", "token_f1", "format"):
            assert 0 <= entry[f"rewards/{name}_reward/mean"] <= 1
        assert 1 <= entry["completions/mean_length"] <= 4
        assert sum(entry["load"]["text"][0]) == pytest.approx(1, abs=1e-3)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the model is its own start
    assert steps[3]["kl"] > 1e-7
    scored = [entry for entry in result.log if "eval_strict_accuracy" in entry]
    assert [entry["step"] for entry in scored] == [0, 2, 4]
    assert [len(entry["answers"]) for entry in scored] == [2, 2, 2]
    logged = json.loads((result.model_folder.parent / "log.json").read_text())
    assert logged == json.loads(json.dumps(result.log))


@pytest.mark.slow
def test_experts_and_routers_moved_and_nothing_else(result, chain):
    moved = {row["part"]: row["moved"] for row in result.log[-1]["moved"]}
    assert {part for part, far in moved.items() if far} == {"experts", "router"}
    saved = load_pretrained_model(result.model_folder).model.config.text_config
    start = load_pretrained_model(chain / "experts" / "model").model.config.text_config
    assert saved.output_router_logits == start.output_router_logits


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["whole", "adapters"])
def test_a_stopped_run_ends_with_the_same_weights(lora, tiny, chain, tmp_path):
    """From its checkpoint on it draws the same answers to the same questions."""
    whole = train(reward_recipe(tiny, chain, tmp_path / "whole", lora=lora), show_progress=False)
    recipe = reward_recipe(tiny, chain, tmp_path / "stopped", lora=lora)
    stopped = train(recipe, show_progress=False)
    shutil.rmtree(stopped.model_folder)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    again = train(recipe, show_progress=False)
    assert [entry["loss"] for entry in again.log if "loss" in entry] == [
        entry["loss"] for entry in whole.log if "loss" in entry
    ]
    ours = model_weights(again)
    assert all(torch.equal(weight, ours[name]) for name, weight in model_weights(whole).items())


@pytest.mark.slow
def test_a_reward_that_can_be_earned_is_learned(tiny, chain, tmp_path, monkeypatch):
    """Answers that begin with a letter are right: the model comes to begin so."""
    from moellava.train import reward_trainer

    def begins_so(completions, **columns):
        texts = [completion[0]["content"] for completion in completions]
        return [float(text[:1].isascii() and text[:1].isalpha()) for text in texts]

    monkeypatch.setattr(reward_trainer, "scorer_reward", lambda name: begins_so)
    result = train(
        reward_recipe(
            tiny,
            chain,
            tmp_path / "out",
            "optim.max_steps=16",
            "optim.learning_rate=2e-2",
            "reward.kl=0",
            "reward.max_new_tokens=1",
            "trainable=[language_model]",
            "optim.batch_size=32",
            "optim.per_device_batch_size=32",
            "reward.num_answers=16",
            "saving.every=100",
        ),
        show_progress=False,
    )
    rewards = [entry["reward"] for entry in result.log if "loss" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards


def test_the_plan_counts_answers(tiny, chain, tmp_path):
    recipe = reward_recipe(tiny, chain, tmp_path / "out", "optim.max_steps=null")
    found = plan(recipe)
    assert found.num_steps == 20 * 4 // 8
    assert "4 to a question of at most 4 tokens; rewards: strict" in found.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["reward.num_answers=3"], r"batch_size=8 answers are not whole groups of reward.num_ans"),
        (["reward.scorers=[strikt]"], r"Did you mean 'strict'"),
        (["reward.num_answers=1"], r"reward.num_answers.*2 or more"),
        (["data.features=kept"], r"data.features does nothing in stage 'reward'"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(settings, message, tiny, chain, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(reward_recipe(tiny, chain, tmp_path / "out", *settings))


def test_other_stages_have_no_rewards():
    with pytest.raises(ValueError, match=r"reward does nothing in stage 'tune'. Leave it out"):
        load_recipe("stage2_tune", ["reward.kl=0"])


def test_without_trl_it_says_what_to_install(tiny, chain, tmp_path, monkeypatch):
    monkeypatch.setattr("moellava.train.reward_stage.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'moellava\[rl\]'"):
        train(reward_recipe(tiny, chain, tmp_path / "out"), show_progress=False)


@pytest.mark.slow
def test_tiles_are_refused(tiny, chain, tmp_path):
    folder = tmp_path / "tiled"
    loaded = load_pretrained_model(chain / "experts" / "model")
    loaded.processor.set_tiling({"max_tiles": 2})
    loaded.model.save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    recipe = reward_recipe(tiny, chain, tmp_path / "out", "after=any", f"start_from={folder}")
    for start in (plan, train):
        with pytest.raises(ValueError, match="takes one view of each image"):
            start(recipe)
