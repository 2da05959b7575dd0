"""What is recorded, against transformers' own outputs on the same weights."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from moellava.explain import recording
from moellava.explain.recording import (
    attention_weights,
    has_whole_cache,
    record,
    recording_attention,
    recording_bytes,
)

NUM_ANSWER = 5


@pytest.fixture(scope="module")
def inputs(loaded, picture):
    """A prompt, followed by five tokens of an answer."""
    prompt = loaded.processor(text=["<image>\nWhat is this? It is"], images=[picture])
    ids = [*prompt["input_ids"][0], *range(300, 300 + NUM_ANSWER)]
    pixels = torch.as_tensor(np.asarray(prompt["pixel_values"]))
    return torch.tensor([ids]), pixels


@pytest.fixture(scope="module")
def recorded(loaded, inputs):
    ids, pixels = inputs
    return record(loaded.model, ids, pixels, num_prompt_tokens=ids.shape[1] - NUM_ANSWER)


@pytest.fixture(scope="module")
def eager(loaded, inputs):
    """transformers' own outputs under eager attention."""
    ids, pixels = inputs
    language_model = loaded.model.model.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = loaded.model(
            input_ids=ids,
            pixel_values=pixels,
            output_attentions=True,
            output_router_logits=True,
            use_cache=False,
        )
    language_model.set_attn_implementation(before)
    return outputs


def rows_and_columns(loaded, ids):
    columns = (ids[0] == loaded.model.config.image_token_id).nonzero()[:, 0]
    rows = torch.arange(ids.shape[1] - NUM_ANSWER - 1, ids.shape[1] - 1)
    return rows, columns


def test_attention_equals_output_attentions_under_eager(loaded, inputs, recorded, eager):
    rows, columns = rows_and_columns(loaded, inputs[0])
    full = torch.stack(eager.attentions)[:, 0]  # (L, H, T, T)
    expected = full[:, :, rows][..., columns].numpy()
    assert recorded.attention.shape == expected.shape == (4, 4, NUM_ANSWER, 100)
    assert recorded.attention.dtype == np.float32
    np.testing.assert_allclose(recorded.attention, expected, rtol=1e-4, atol=1e-7)
    shifted = full[:, :, rows + 1][..., columns].numpy()
    assert not np.allclose(recorded.attention, shifted, rtol=1e-2)  # the oracle can say no


def test_a_row_is_that_of_the_step_that_chose_the_token(loaded, picture):
    prompt = loaded.processor(
        text=["<image>\nWhat is this?"], images=[picture], return_tensors="pt"
    )
    language_model = loaded.model.model.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    generated = loaded.model.generate(
        **prompt,
        max_new_tokens=4,
        min_new_tokens=4,
        max_length=None,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    language_model.set_attn_implementation(before)
    num_prompt = prompt["input_ids"].shape[1]
    found = record(
        loaded.model, generated.sequences, prompt["pixel_values"], num_prompt_tokens=num_prompt
    )
    columns = (prompt["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[:, 0]
    for step, layers in enumerate(generated.attentions):
        expected = torch.stack(layers)[:, 0, :, -1][..., columns]  # (L, H, N)
        np.testing.assert_allclose(
            found.attention[:, :, step], expected.numpy(), rtol=1e-3, atol=1e-6
        )


def test_rollout_is_the_product_of_the_mixed_layers(loaded, inputs, recorded, eager):
    rows, columns = rows_and_columns(loaded, inputs[0])
    product = torch.eye(inputs[0].shape[1])
    for layer in eager.attentions:
        product = (0.5 * layer[0].mean(0) + 0.5 * torch.eye(len(product))) @ product
    np.testing.assert_allclose(
        recorded.rollout, product[rows][:, columns].numpy(), rtol=1e-4, atol=1e-7
    )


def test_routes_equal_the_top_k_of_router_logits(loaded, recorded, eager):
    k = loaded.model.config.text_config.num_experts_per_tok
    for layer, logits in enumerate(eager.router_logits):
        probabilities, experts = logits.softmax(-1).topk(k)
        np.testing.assert_array_equal(recorded.experts[layer], experts.numpy())
        weights = probabilities / probabilities.sum(-1, keepdim=True)
        np.testing.assert_allclose(recorded.weights[layer], weights.numpy(), rtol=1e-3)


def test_logprobs_equal_those_of_the_logits(inputs, recorded, eager):
    ids = inputs[0][0]
    logprobs = eager.logits[0].log_softmax(-1)
    expected = [
        float(logprobs[place - 1, ids[place]]) for place in range(len(ids) - NUM_ANSWER, len(ids))
    ]
    np.testing.assert_allclose(recorded.logprobs, expected, rtol=1e-4)


def test_heads_in_chunks_are_heads_at_once(loaded, inputs, recorded, monkeypatch):
    monkeypatch.setattr(recording, "CHUNK_BYTES", 1)  # one head at a time
    ids, pixels = inputs
    chunked = record(loaded.model, ids, pixels, num_prompt_tokens=ids.shape[1] - NUM_ANSWER)
    np.testing.assert_allclose(chunked.attention, recorded.attention, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(chunked.rollout, recorded.rollout, rtol=1e-4, atol=1e-7)


def test_the_model_is_left_as_it_was(loaded, inputs):
    ids, pixels = inputs
    config = loaded.model.model.language_model.config
    before = config._attn_implementation
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        record(loaded.model, ids, pixels.repeat(2, 1, 1, 1), num_prompt_tokens=50)
    assert config._attn_implementation == before
    assert loaded.model.model.vision_tower.config._attn_implementation != recording.IMPLEMENTATION


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_weights_equal_those_of_eager_attention(loaded, mask):
    attention = loaded.model.model.language_model.layers[0].self_attn
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 5, 8), *torch.randn(2, 1, 2, 7, 8).unbind(0)
    hidden = torch.ones(5, 7, dtype=torch.bool).triu(3)[None, None]  # two tokens in the cache
    added = torch.zeros(1, 1, 5, 7).masked_fill(hidden, float("-inf"))
    _, expected = eager_attention_forward(attention, query, key, value, added, scaling=0.3)
    masks = {"none": None, "bool": ~hidden, "float": added}
    found = torch.cat(list(attention_weights(query, key, masks[mask], 0.3)))
    torch.testing.assert_close(found, expected[0])


def test_the_model_computes_what_it_always_does(loaded, inputs):
    """To the bit, so that an explained answer is the answer."""
    ids, pixels = inputs
    with torch.inference_mode():
        expected = loaded.model(input_ids=ids, pixel_values=pixels).logits
        with recording._recording(loaded.model, ids, ids.shape[1] - NUM_ANSWER) as recorder:
            found = loaded.model(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(found, expected)
    assert recorder.routes


def test_attention_that_would_be_recorded_wrongly_is_refused(loaded):
    tensor = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="softcap"):
        recording_attention(loaded.model, tensor, tensor, tensor, None, 1.0, softcap=30.0)


def test_a_recording_beyond_the_limit_names_both_sizes(loaded, inputs):
    ids, pixels = inputs
    with pytest.raises(ValueError, match=r"takes 2\d\d MiB, but max_bytes allows 1 MiB"):
        record(loaded.model, ids, pixels, num_prompt_tokens=50, max_bytes=2**20)


def test_a_long_answer_at_real_size_stays_under_a_gigabyte():
    from transformers import LlamaConfig

    tinyllama = LlamaConfig(num_hidden_layers=22, num_attention_heads=32)
    assert recording_bytes(tinyllama, 2048, 512, 196) < 2**30


def test_a_sliding_window_is_no_whole_cache(loaded):
    from types import SimpleNamespace

    from transformers import MistralConfig

    assert has_whole_cache(loaded.model)
    config = MistralConfig(sliding_window=16)
    sliding = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert not has_whole_cache(sliding)
