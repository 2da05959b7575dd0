"""Cases of transformers' ModelTesterMixin and GenerationTesterMixin, on a mixture and on a dense
model.

The mixins are not in transformers' wheel; test_transformers_suite.py runs the first where its
source is at hand.
"""

import copy

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
)

from moellava import LlamaMoeConfig, MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaModel
from moellava.testing import in_fresh_memory

IMAGE = 7
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def build(text_config, **options):
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = MoeLlavaConfig(vision_config=vision, text_config=text_config, image_token_id=IMAGE)
    torch.manual_seed(0)
    model = MoeLlavaForConditionalGeneration._from_config(config, **options)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.eval()


TEXT_CONFIGS = {"mixture": LlamaMoeConfig, "dense": LlamaConfig}


@pytest.fixture(scope="module", params=TEXT_CONFIGS)
def text_config(request):
    return TEXT_CONFIGS[request.param](**TEXT)


@pytest.fixture(scope="module")
def shared(text_config):
    """Tests that change nothing share this one."""
    return build(copy.deepcopy(text_config))


@pytest.fixture
def own(text_config):
    return build(copy.deepcopy(text_config))


@pytest.fixture(scope="module")
def inputs():
    """Two prompts of one image each, the first padded on the left."""
    ids = torch.tensor(
        [
            [0, 0, 1, IMAGE, IMAGE, IMAGE, IMAGE, 20, 21],
            [1, 30, IMAGE, IMAGE, IMAGE, IMAGE, 31, 32, 33],
        ]
    )
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def row(inputs, index):
    mask = inputs["attention_mask"][index].bool()
    return {
        "input_ids": inputs["input_ids"][index : index + 1, mask],
        "attention_mask": inputs["attention_mask"][index : index + 1, mask],
        "pixel_values": inputs["pixel_values"][index : index + 1],
    }


class TestModelCases:
    def test_save_load(self, own, inputs, tmp_path):
        own.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        with torch.no_grad():
            expected = in_fresh_memory(own)(**inputs).logits
            assert torch.equal(in_fresh_memory(again)(**inputs).logits, expected)

    def test_the_base_model_loads_from_a_checkpoint_with_a_head(self, own, inputs, tmp_path):
        own.save_pretrained(tmp_path)
        base = in_fresh_memory(MoeLlavaModel.from_pretrained(tmp_path).eval())
        with torch.no_grad():
            expected = in_fresh_memory(own).model(**inputs).last_hidden_state
            assert torch.equal(base(**inputs).last_hidden_state, expected)

    @pytest.mark.parametrize("rows", [120, 50])
    def test_resize_embeddings(self, own, inputs, rows, tmp_path):
        with torch.no_grad():
            before = own(**inputs).logits
            own.resize_token_embeddings(rows)
            after = own(**inputs).logits
        assert (
            own.get_input_embeddings().weight.shape[0]
            == own.get_output_embeddings().weight.shape[0]
            == rows
        )
        assert own.config.text_config.vocab_size == after.shape[-1] == rows
        known = min(rows, 99)
        torch.testing.assert_close(after[..., :known], before[..., :known], rtol=0, atol=1e-5)
        own.save_pretrained(tmp_path)
        assert AutoModelForImageTextToText.from_pretrained(tmp_path).lm_head.weight.shape[0] == rows

    def test_tied_weights_are_one_parameter_also_after_a_reload_and_a_resize(
        self, text_config, tmp_path
    ):
        tied = copy.deepcopy(text_config)
        tied.tie_word_embeddings = True
        model = build(tied)
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        for candidate in (model, again):
            candidate.resize_token_embeddings(101)
            assert candidate.lm_head.weight is candidate.get_input_embeddings().weight
            assert candidate.lm_head.weight.shape == (101, 32)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_equality(self, text_config, inputs, use_reentrant):
        text_config = copy.deepcopy(text_config)
        if use_reentrant:
            text_config.router_aux_loss_coef = 0.0  # its gradient would be lost: the next test
        gradients = []
        for checkpointing in (False, True):
            model = build(copy.deepcopy(text_config)).train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append(
                {
                    name: weight.grad
                    for name, weight in model.named_parameters()
                    if weight.grad is not None
                }
            )
        assert gradients[0].keys() == gradients[1].keys()
        assert any("vision_tower" in name for name in gradients[0])
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(
                gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}"
            )

    def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_routers_losses(self):
        model = build(LlamaMoeConfig(**TEXT))
        for enable in (model.activation_checkpointing_enable, model.gradient_checkpointing_enable):
            with pytest.raises(
                ValueError, match=r"use_reentrant=True loses the gradient of the router's losses"
            ):
                enable({"use_reentrant": True})

    def test_attention_outputs(self, text_config, inputs):
        model = build(copy.deepcopy(text_config), attn_implementation="eager")
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        assert [tuple(layer.shape) for layer in attentions] == [(2, 4, 9, 9)] * 2
        torch.testing.assert_close(attentions[0][1].sum(-1), torch.ones(4, 9))

    def test_hidden_states_output(self, shared, inputs):
        with torch.no_grad():
            outputs = shared(**inputs, output_hidden_states=True)
            base = shared.model(**inputs)
        assert [tuple(layer.shape) for layer in outputs.hidden_states] == [(2, 9, 32)] * 3
        assert torch.equal(outputs.hidden_states[-1], base.last_hidden_state)

    @pytest.mark.parametrize("other", ["sdpa", "flex_attention"])
    def test_attention_implementations_agree(self, text_config, inputs, other):
        eager = build(copy.deepcopy(text_config), attn_implementation="eager")
        model = build(
            copy.deepcopy(text_config),
            attn_implementation={"text_config": other, "vision_config": "eager"},
        )
        assert model.config.text_config._attn_implementation == other
        is_token = inputs["attention_mask"].bool()
        with torch.no_grad():
            ours, theirs = model(**inputs).logits, eager(**inputs).logits
        torch.testing.assert_close(ours[is_token], theirs[is_token], rtol=0, atol=1e-4)

    def test_the_attention_implementation_can_be_changed_later(self, own, inputs):
        with torch.no_grad():
            before = own(**inputs).logits
            own.set_attn_implementation("eager")
            after = own(**inputs).logits
        assert own.model.language_model.config._attn_implementation == "eager"
        is_token = inputs["attention_mask"].bool()
        torch.testing.assert_close(after[is_token], before[is_token], rtol=0, atol=1e-4)

    def test_inputs_embeds_match_input_ids(self, shared, inputs):
        embeds = shared.get_input_embeddings()(inputs["input_ids"])
        rest = {name: inputs[name] for name in ("attention_mask", "pixel_values")}
        with torch.no_grad():
            assert torch.equal(shared(inputs_embeds=embeds, **rest).logits, shared(**inputs).logits)

    def test_the_old_name_of_the_cache_works_and_warns(self, shared, inputs):
        with torch.no_grad():
            first = shared(**row(inputs, 1), use_cache=True)
            expected = shared(
                input_ids=torch.tensor([[9]]), cache=copy.deepcopy(first.cache)
            ).logits
            with pytest.warns(FutureWarning, match="past_key_values"):
                old = shared(input_ids=torch.tensor([[9]]), past_key_values=first.cache).logits
        assert torch.equal(old, expected)

    def test_a_tuple_is_returned_on_request(self, shared, inputs):
        with torch.no_grad():
            assert torch.equal(shared(**inputs, return_dict=False)[0], shared(**inputs).logits)

    def test_half_precision_keeps_routers_in_float32(self, own, tmp_path):
        own.save_pretrained(tmp_path)
        model = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
        dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
        assert {dtype for name, dtype in dtypes.items() if "mlp.gate." not in name} == {
            torch.bfloat16
        }
        assert {dtype for name, dtype in dtypes.items() if ".mlp.gate.weight" in name} <= {
            torch.float32
        }

    def test_a_checkpoint_with_missing_weights_is_refused(self, own, tmp_path):
        own.save_pretrained(
            tmp_path,
            state_dict={k: v for k, v in own.state_dict().items() if "layers.1.mlp" not in k},
        )
        with pytest.raises(ValueError, match=r"missing.*layers\.1\.mlp"):
            AutoModelForImageTextToText.from_pretrained(tmp_path)


class TestGenerationCases:
    def test_left_padding_compatibility(self, shared, inputs):
        together = shared.generate(**inputs, **NEW)[:, 9:]
        alone = [shared.generate(**row(inputs, index), **NEW)[0, -6:] for index in range(2)]
        assert torch.equal(together, torch.stack(alone))

    @pytest.mark.parametrize("implementation", ["static", "offloaded_static"])
    def test_static_cache(self, shared, inputs, implementation):
        if implementation == "offloaded_static" and not torch.cuda.is_available():
            pytest.skip("offloading needs an accelerator")
        static = shared.generate(**inputs, **NEW, cache_implementation=implementation)
        assert torch.equal(static, shared.generate(**inputs, **NEW))

    def test_without_a_cache(self, shared, inputs):
        assert torch.equal(
            shared.generate(**inputs, **NEW, use_cache=False), shared.generate(**inputs, **NEW)
        )

    def test_generate_from_inputs_embeds(self, shared, inputs):
        embeds = shared.get_input_embeddings()(inputs["input_ids"])
        rest = {name: inputs[name] for name in ("attention_mask", "pixel_values")}
        new = shared.generate(inputs_embeds=embeds, **rest, **NEW)
        assert torch.equal(new, shared.generate(**inputs, **NEW)[:, 9:])

    def test_generate_continues_from_a_cache(self, shared, inputs):
        whole = shared.generate(**inputs, **NEW, return_dict_in_generate=True)
        first = shared.generate(
            **inputs,
            **{**NEW, "max_new_tokens": 3, "min_new_tokens": 3},
            return_dict_in_generate=True,
        )
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
        rest = {**NEW, "max_new_tokens": 3, "min_new_tokens": 3}
        second = shared.generate(
            input_ids=first.sequences, attention_mask=mask, cache=first.cache, **rest
        )
        assert torch.equal(second, whole.sequences)

    def test_beams_and_samples(self, shared, inputs):
        torch.manual_seed(0)
        beams = shared.generate(**inputs, **NEW, num_beams=3, num_return_sequences=2)
        samples = shared.generate(**inputs, **{**NEW, "do_sample": True}, num_return_sequences=2)
        assert beams.shape == samples.shape == (4, 15)
        scores = [
            shared(
                **row(inputs, 0) | {"input_ids": ids[None, 2:], "attention_mask": None}
            ).logits[0, -7:-1]
            .log_softmax(-1).gather(1, ids[-6:, None]).sum()
            for ids in (beams[0], shared.generate(**inputs, **NEW)[0])
        ]  # fmt: skip
        assert scores[0] >= scores[1] - 1e-5  # a beam search is no worse than its greedy path

    def test_attentions_and_hidden_states_of_generate(self, text_config, inputs):
        model = build(copy.deepcopy(text_config), attn_implementation="eager")
        output = model.generate(
            **inputs, **NEW, return_dict_in_generate=True, output_attentions=True,
            output_hidden_states=True,
            output_logits=True,
        )  # fmt: skip
        assert len(output.attentions) == len(output.hidden_states) == len(output.logits) == 6
        assert output.attentions[0][0].shape == (2, 4, 9, 9)
        assert output.hidden_states[1][-1].shape == (2, 1, 32)

    def test_the_image_matters_to_what_is_generated(self, shared, inputs):
        other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
        options = {"return_dict_in_generate": True, "output_logits": True}
        logits = [shared.generate(**given, **NEW, **options).logits[0] for given in (inputs, other)]
        assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_compiled_model_gives_the_same_logits_in_one_graph(shared, inputs):
    torch.compiler.reset()
    compiled = torch.compile(shared, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs).logits, shared(**inputs).logits, rtol=0, atol=1e-5
        )
