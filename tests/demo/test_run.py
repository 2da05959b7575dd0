"""The first proof that image information reaches the language model, in a short setting; and its counter-proof."""

import pytest
from PIL import Image

from moellava.demo.questions import Example
from moellava.demo.run import DemoResult, exchange_images, majority_answers, run_demo, share_correct

NUM_STEPS = 160  # `moellava demo` trains for 400
MARGIN = 0.15  # over both baselines


def beats_both_baselines(result: DemoResult) -> bool:
    return result.accuracy > max(result.blank_accuracy, result.majority_accuracy) + MARGIN


@pytest.mark.slow
def test_the_demo_beats_blank_images_and_the_majority_answer(tmp_path, no_network):
    result = run_demo(tmp_path, num_steps=NUM_STEPS, seed=0, show_progress=False)
    assert beats_both_baselines(result), result


@pytest.mark.slow
def test_a_model_trained_on_exchanged_images_does_not(tmp_path, no_network):
    result = run_demo(
        tmp_path, num_steps=NUM_STEPS, seed=0, show_progress=False, shuffle_images=True
    )
    assert not beats_both_baselines(result), result


def test_a_missing_package_is_named_before_the_training(tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "nilearn" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r'needs nilearn. Type: pip install "moellava\[demo\]"'):
        run_demo(tmp_path, num_steps=1, seed=0)


def example(question: str, answer: str) -> Example:
    return Example(Image.new("RGB", (4, 4)), "s", "CT", question, answer)


def test_the_majority_answer_is_counted_per_question():
    train = [example("a", "yes"), example("a", "yes"), example("a", "no"), example("b", "no")]
    held_out = [example("a", "no"), example("b", "no"), example("c", "yes")]
    assert majority_answers(train, held_out) == ["yes", "no", "yes"]


def test_an_answer_must_be_the_whole_word():
    examples = [example("a", "no"), example("b", "CT"), example("c", "MR")]
    assert share_correct(examples, ["normal", "ct.", "MR image"]) == pytest.approx(1 / 3)


def test_exchanging_moves_images_and_nothing_else():
    examples = [example(str(index), "yes") for index in range(20)]
    exchanged = exchange_images(examples, seed=0)
    assert [e.question for e in exchanged] == [e.question for e in examples]
    assert {id(e.image) for e in exchanged} == {id(e.image) for e in examples}
    assert sum(a.image is not b.image for a, b in zip(examples, exchanged, strict=True)) > 15
