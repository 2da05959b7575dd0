"""Held-out questions while a stage trains: answered and scored by the code of `moellava eval`."""

import copy
import json
import shutil

import pytest

from moellava.data import Row, Turn, read_rows
from moellava.eval.predictions import Prediction
from moellava.eval.questions import questions_of
from moellava.eval.run import evaluate
from moellava.eval.settings import EvaluationSettings
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.chat_templates import VICUNA_V1
from moellava.model.loaded_model import LoadedModel
from moellava.train import load_recipe, train
from moellava.train.answers import answer_questions, answer_rows, share_exact
from moellava.train.batches import build_collator
from tests.train.tiny import parts_of, tiny_recipe

QUESTION = "What is a CT?"
NAMES = ("eval_strict_accuracy", "eval_token_f1_f1")


def scores_of(log):
    """Step → what was logged of scorers and answers."""
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("eval_")}
        for entry in log
        if "eval_strict_accuracy" in entry and "eval_loss" not in entry
    }


def test_the_last_scores_are_those_of_moellava_eval(chain, tiny, tmp_path):
    log = json.loads((chain / "experts" / "log.json").read_text())
    logged = scores_of(log)
    assert list(logged) == [0, 2, 4]
    rows = read_rows(tiny / "rows.json", images=tiny / "images")[:6]
    settings = EvaluationSettings(
        max_new_tokens=32, scorers=("strict", "token_f1"), num_resamples=2, dtype="float32"
    )
    scores = evaluate(chain / "experts" / "model", rows, tmp_path, settings)
    expected = {
        f"eval_{scorer}_{metric}": pytest.approx(found["value"])
        for scorer, entry in scores["scorers"].items()
        for metric, found in entry["metrics"].items()
    }
    assert set(NAMES) <= set(expected)
    assert {name: value for name, value in logged[4].items() if name in expected} == expected
    assert logged[4].keys() - set(expected) == {"eval_answers_exact"}


def test_scores_are_shown_in_the_terminal_and_in_tensorboard(tiny, tmp_path, capsys, quick_runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe(
        tiny,
        "tune",
        tmp_path / "out",
        "optim.max_steps=1",
        f"data.evaluation={tiny / 'rows.json'}",
        "evaluation.num_rows=2",
        "evaluation.num_answers=0",
        "evaluation.max_new_tokens=2",
        "evaluation.scorers=[strict]",
        "logging.report_to=[tensorboard]",
    )
    log = train(recipe).log
    shown = capsys.readouterr()
    assert "eval_strict_accuracy" in shown.out + shown.err
    [folder] = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload().Scalars("eval/strict_accuracy")
    assert [event.step for event in events][-1] == 1
    assert events[-1].value == pytest.approx(scores_of(log)[1]["eval_strict_accuracy"])


def test_a_resumed_run_has_the_same_scores(tiny, tmp_path, quick_runs):
    recipe = tiny_recipe(
        tiny,
        "tune",
        tmp_path / "out",
        "optim.max_steps=4",
        f"data.evaluation={tiny / 'rows.json'}",
        "evaluation.num_rows=4",
        "evaluation.every=1",
        "evaluation.max_new_tokens=3",
        "evaluation.scorers=[strict, token_f1]",
    )
    whole = scores_of(train(recipe, show_progress=False).log)
    for folder in ("model", "checkpoint-4"):
        shutil.rmtree(tmp_path / "out" / folder)
    resumed = scores_of(train(recipe, show_progress=False).log)
    assert list(whole) == [0, 1, 2, 3, 4]
    assert resumed == whole


def test_every_question_of_a_conversation_is_asked(tiny, chain):
    loaded = load_pretrained_model(chain / "tune" / "model", dtype="float32")
    rows = read_rows(tiny / "rows.json", images=tiny / "images")[1:3]
    question, answer = rows[0].turns
    turns = (question, answer, Turn("user", "And why?"), answer)
    rows[0] = Row(id="two", images=rows[0].images, turns=turns)
    recipe = load_recipe("stage2_tune")
    collator = build_collator(recipe, loaded.processor)
    questions = list(questions_of(rows))
    found = answer_questions(loaded, rows, questions, collator, max_new_tokens=2)
    assert [one.id for one in found] == ["two", "two#2", "row2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.scorers=[strikt]", "data.evaluation=x"], "Did you mean 'strict'"),
        (["evaluation.scorers=[strict]"], "no held-out rows. Set data.evaluation=FILE"),
        (["evaluation.scorers=3"], "evaluation.scorers is 3; expected a list"),
        (["evaluation.scorer=strict"], "Did you mean 'evaluation.scorers'"),
    ],
)
def test_mistakes_in_a_recipe(settings, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("stage2_tune", settings)


def row(name: str, question: str, answer: str, *images: str) -> Row:
    turns = (Turn("user", question), Turn("assistant", answer), Turn("user", "Sure?"))
    return Row(id=name, images=images, turns=(*turns, Turn("assistant", "Yes.")))


@pytest.fixture(scope="module")
def asked(tiny):
    loaded = load_pretrained_model(parts_of(tiny), dtype="float32")
    rows = [
        row("a", "<image>\nIs this a CT image?", "yes", str(tiny / "images" / "1.png")),
        row("b", QUESTION, "A scan."),
        row("c", "<image>\nWhy?", "Because.", str(tiny / "images" / "2.png")),
    ]
    recipe = load_recipe("stage3_experts", ["data.chat_template=null"])
    return loaded, rows, build_collator(recipe, loaded.processor)


def test_they_are_what_answer_says_to_the_first_question(asked):
    loaded, rows, collator = asked
    found = answer_rows(loaded, rows, collator, max_new_tokens=6, batch_size=2)
    assert [item.id for item in found] == ["a", "b", "c"]
    assert [item.truth for item in found] == ["yes", "A scan.", "Because."]
    questions = ["Is this a CT image?", "What is a CT?", "Why?"]
    images = [list(row.images) or None for row in rows]
    assert [item.answer for item in found] == [
        loaded.answer([image], [question], max_new_tokens=6)[0]
        for image, question in zip(images, questions, strict=True)
    ]


def test_prompts_are_written_by_the_template_that_is_trained_on(asked):
    loaded, rows, _ = asked
    recipe = load_recipe("stage3_experts", ["data.chat_template=vicuna_v1"])
    collator = build_collator(recipe, loaded.processor)
    assert collator.chat_template == VICUNA_V1 != loaded.processor.chat_template
    (found,) = answer_rows(loaded, rows[1:2], collator, max_new_tokens=6)
    processor = copy.copy(loaded.processor)
    processor.chat_template = VICUNA_V1
    (expected,) = LoadedModel(loaded.model, processor).answer(None, [QUESTION], max_new_tokens=6)
    assert found.answer == expected
    assert found.answer != loaded.answer(None, [QUESTION], max_new_tokens=6)[0]


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(asked, training):
    loaded, rows, collator = asked
    loaded.model.train(training)
    answer_rows(loaded, rows[:1], collator, max_new_tokens=1)
    assert loaded.model.training is training


def test_the_share_of_exact_answers():
    pairs = [("yes", "yes"), ("Yes.", "yes"), ("normal", "no"), ("", "no")]
    answers = [
        Prediction(id="0", answer=a, truth=t, answer_type="open", answer_type_from="data")
        for a, t in pairs
    ]
    assert share_exact(answers) == 0.5
