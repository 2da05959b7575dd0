"""The evaluation's batches against `answer`, the model's own way to a single answer."""

import pytest
import torch

from moellava.data import Turn
from moellava.eval.asking import Asked, Asker
from moellava.eval.questions import questions_of
from moellava.images import load_image

MAX_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def asked(eval_rows):
    return [
        Asked(id=q.id, turns=q.turns, images=q.image_names, options=("yes", "no"))
        for q in questions_of(eval_rows, root=eval_rows.image_root)
    ]


@pytest.fixture(scope="module")
def load(eval_rows):
    return lambda name: load_image(eval_rows.image_root / name)


def answers(asker, asked):
    return {one.id: one for batch in asker.ask(asked) for one in batch}


@pytest.fixture(scope="module")
def by_answer(tiny_loaded, asked, load):
    """What `LoadedModel.answer` says to each single question."""
    texts = {}
    for one in asked:
        if len(one.turns) == 1:
            picture = load(one.images[0]) if one.images else None
            text = one.turns[0].text.replace("<image>\n", "")
            texts[one.id] = tiny_loaded.answer(picture, text, max_new_tokens=MAX_NEW_TOKENS)[0]
    return texts


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_batch_size_and_order_do_not_change_an_answer(
    tiny_loaded, asked, load, by_answer, batch_size, is_reversed
):
    asker = Asker(tiny_loaded, load, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size)
    found = answers(asker, asked[::-1] if is_reversed else asked)
    assert found.keys() == {one.id for one in asked}
    assert {row_id: found[row_id].text for row_id in by_answer} == by_answer


def test_each_image_is_encoded_once(tiny_loaded, asked, load, monkeypatch):
    encoded = []
    original = tiny_loaded.model.get_image_features

    def counted(pixel_values, **options):
        encoded.append(len(pixel_values))
        return original(pixel_values, **options)

    monkeypatch.setattr(tiny_loaded.model, "get_image_features", counted)
    loads = []

    def load_counted(name):
        loads.append(name)
        return load(name)

    answers(Asker(tiny_loaded, load_counted, max_new_tokens=2, batch_size=4), asked)
    assert sum(encoded) == 7
    assert sorted(loads) == sorted(set(loads))


def test_an_image_at_the_edge_of_a_window_is_not_encoded_again(
    tiny_loaded, asked, load, monkeypatch
):
    monkeypatch.setattr("moellava.eval.asking._BATCHES_IN_WINDOW", 1)
    loads = []

    def load_counted(name):
        loads.append(name)
        return load(name)

    answers(Asker(tiny_loaded, load_counted, max_new_tokens=2, batch_size=3), asked)
    assert sorted(loads) == sorted(set(loads))


def test_tokens_are_counted_up_to_the_end(tiny_loaded, asked, load, monkeypatch):
    """The end is what the generation config says; here a token that the first answer has."""
    asker = Asker(tiny_loaded, load, max_new_tokens=MAX_NEW_TOKENS, batch_size=4)
    before = answers(asker, asked[:4])
    assert {(one.num_tokens, one.is_cut) for one in before.values()} == {(MAX_NEW_TOKENS, True)}

    prompt = asker.prompt_ids(asked[0])
    inputs = torch.tensor([prompt])
    features = tiny_loaded.processor.image_processor(
        [load(asked[0].images[0])], return_tensors="pt"
    )
    generated = tiny_loaded.model.generate(
        input_ids=inputs, pixel_values=features["pixel_values"], do_sample=False, max_length=None,
        max_new_tokens=MAX_NEW_TOKENS,
    )[0, len(prompt) :]  # fmt: skip
    end = int(generated[2])
    first = generated.tolist().index(end)
    monkeypatch.setattr(tiny_loaded.model.generation_config, "eos_token_id", [end])
    [found] = answers(asker, asked[:1]).values()
    assert (found.num_tokens, found.is_cut) == (first, False)


def test_probabilities_are_those_of_the_first_position(tiny_loaded, asked, load):
    asker = Asker(tiny_loaded, load, max_new_tokens=2, batch_size=5)
    found = answers(asker, asked)
    one = asked[0]
    inputs = torch.tensor([asker.prompt_ids(one)])
    pixels = tiny_loaded.processor.image_processor([load(one.images[0])], return_tensors="pt")
    with torch.inference_mode():
        outputs = tiny_loaded.model(input_ids=inputs, pixel_values=pixels["pixel_values"])
    logits = outputs.logits[0, -1].double()
    tokenizer = tiny_loaded.tokenizer
    prompt = tokenizer.decode(asker.prompt_ids(one)[-8:])

    def share(words):
        before = len(tokenizer(prompt)["input_ids"])
        ids = {tokenizer(prompt + word)["input_ids"][before] for word in words}
        return logits.softmax(0)[sorted(ids)].sum()

    yes, no = share(["yes", "Yes", "YES"]), share(["no", "No", "NO"])
    assert found[one.id].probabilities["yes"] == pytest.approx(float(yes / (yes + no)), abs=1e-5)
    assert sum(found[one.id].probabilities.values()) == pytest.approx(1)


def test_options_that_begin_alike_have_no_probabilities(tiny_loaded, load):
    alike = Asked(
        id="1", turns=(Turn("user", "Which?"),), images=(), options=("left lung", "left heart")
    )
    [found] = answers(Asker(tiny_loaded, load, max_new_tokens=2), [alike]).values()
    assert found.probabilities is None


def test_a_prompt_beyond_the_context_is_named(tiny_loaded, load):
    long = Asked(id="row9", turns=(Turn("user", "why " * 4000),), images=())
    with pytest.raises(ValueError, match=r"row 'row9' has \d+ tokens.*tokens would be cut"):
        Asker(tiny_loaded, load).check([long])


def test_training_mode_is_restored(tiny_loaded, asked, load):
    tiny_loaded.model.train()
    answers(Asker(tiny_loaded, load, max_new_tokens=1), asked[:1])
    assert tiny_loaded.model.training
    tiny_loaded.model.eval()
