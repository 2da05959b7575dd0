"""The model against transformers' Mixtral and Llama: training, generation, round trips."""

import inspect
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moellava.model.language_model import (
    LlamaMoeConfig,
    LlamaMoeForCausalLM,
    LlamaMoeModel,
    load_balancing_loss,
)
from moellava.testing import in_fresh_memory


def make_mixture(seed=0, **fields):
    small = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaMoeForCausalLM(LlamaMoeConfig(**{**small, **fields})).eval()


@pytest.fixture
def mixture():
    return make_mixture()


def mixtral_of(mixture):
    """transformers' Mixtral with the same weights; possible where every layer is sparse."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "router_aux_loss_coef",
    )
    fields = {name: getattr(mixture.config, name) for name in names}
    mixtral = MixtralForCausalLM(
        MixtralConfig(num_local_experts=mixture.config.num_experts, **fields)
    ).eval()
    mixtral.load_state_dict(mixture.state_dict())
    return mixtral


def left_padded(ids, num_pad, pad_token=0):
    """Row 0 gets `num_pad` padding tokens on its left in place of its first tokens."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :num_pad], mask[0, :num_pad] = pad_token, 0
    return ids, mask


# --- the same function as other people's models ---


def test_all_sparse_layers_equal_mixtral_bit_for_bit(ids):
    mixture = make_mixture(moe_layers="dense")
    ours, theirs = (
        mixture(ids, output_router_logits=True),
        mixtral_of(mixture)(ids, output_router_logits=True),
    )
    assert torch.equal(ours.logits, theirs.logits)
    for mine, other in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(mine, other)


def test_gradients_equal_mixtral(ids):
    mixture = make_mixture(moe_layers="dense", router_aux_loss_coef=0.0).train()
    mixtral = mixtral_of(mixture).train()
    mixture(ids, labels=ids).loss.backward()
    mixtral(ids, labels=ids).loss.backward()
    for (name, ours), theirs in zip(mixture.named_parameters(), mixtral.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_another_top_k_differs_from_mixtral(ids):
    mixture = make_mixture(moe_layers="dense")
    mixtral = mixtral_of(mixture)
    for module in mixture.modules():
        if hasattr(module, "top_k"):
            module.top_k = 1
    assert (mixture(ids).logits - mixtral(ids).logits).abs().max() > 1e-2


@settings(deadline=None, max_examples=12)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    data=st.data(),
)
def test_any_configuration_equals_mixtral(layers, experts, heads, tied, data):
    top_k = data.draw(st.integers(1, experts))
    kv_heads = data.draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0]))
    mixture = make_mixture(
        moe_layers="dense",
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    ids = torch.randint(1, 99, (2, 5), generator=torch.Generator().manual_seed(layers))
    torch.testing.assert_close(mixture(ids).logits, mixtral_of(mixture)(ids).logits)


def test_only_the_chosen_layers_are_sparse():
    mixture = make_mixture(moe_layers=[1, 2])
    dense = LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4})
    )
    kinds = [type(layer.mlp).__name__ for layer in mixture.model.layers]
    assert kinds == ["LlamaMLP", "LlamaMoeSparseBlock", "LlamaMoeSparseBlock", "LlamaMLP"]
    assert type(mixture.model.layers[0].self_attn) is type(dense.model.layers[0].self_attn)


# --- losses ---


def test_aux_loss_is_that_of_the_returned_router_logits_and_leaves_padding_out(mixture, ids):
    ids, mask = left_padded(ids, 4)
    output = mixture(ids, attention_mask=mask, output_router_logits=True)
    assert [tuple(layer.shape) for layer in output.router_logits] == [(18, 4)] * 2
    per_layer = [
        load_balancing_loss_func((layer,), 4, 2, mask) / 2 for layer in output.router_logits
    ]
    torch.testing.assert_close(output.aux_loss, torch.stack(per_layer).mean())


def test_training_loss_contains_the_penalties_and_evaluation_loss_does_not(ids):
    plain = make_mixture(router_aux_loss_coef=0.0).train()
    penalised = make_mixture(router_aux_loss_coef=0.5, router_z_loss_coef=0.25).train()
    base, output = plain(ids, labels=ids), penalised(ids, labels=ids)
    logits = penalised(ids, output_router_logits=True).router_logits
    z_loss = torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).mean()
    torch.testing.assert_close(
        output.loss, base.loss + 0.5 * load_balancing_loss(logits, 4, 2) + 0.25 * z_loss
    )
    torch.testing.assert_close(output.aux_loss, load_balancing_loss(logits, 4, 2))
    torch.testing.assert_close(
        penalised.eval()(ids, labels=ids).loss, plain.eval()(ids, labels=ids).loss
    )


def test_gradient_accumulation_gives_the_whole_batchs_penalty(ids):
    model = make_mixture(router_aux_loss_coef=1.0).train()
    with torch.no_grad():
        rows = [model(row[None], labels=row[None]).aux_loss for row in ids]
        total = sum(model(row[None], labels=row[None], num_items_in_batch=16).loss for row in ids)
        model.config.router_aux_loss_coef = 0.0
        cross_entropy = sum(
            model(row[None], labels=row[None], num_items_in_batch=16).loss for row in ids
        )
    torch.testing.assert_close(total - cross_entropy, torch.stack(rows).mean())


def test_router_logits_are_returned_only_when_asked_for(mixture, ids):
    assert mixture(ids).router_logits is None
    assert mixture(ids).aux_loss is None
    mixture.config.output_router_logits = True
    assert len(mixture(ids).router_logits) == 2


def test_activation_checkpointing_changes_neither_losses_nor_gradients(ids):
    results = []
    for checkpointing in (False, True):
        model = make_mixture().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        results.append(
            [output.loss, output.aux_loss, *(parameter.grad for parameter in model.parameters())]
        )
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_two_runs_are_equal_bit_for_bit(ids):
    gradients = []
    for _ in range(2):
        model = make_mixture().train()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- generation ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "sampling", "static cache", "no cache"],
)
def test_generation_equals_mixtral(options, ids):
    mixture = make_mixture(moe_layers="dense")
    prompt, mask = left_padded(ids, 3)
    tokens = []
    for model in (mixture, mixtral_of(mixture)):
        torch.manual_seed(3)
        tokens.append(
            model.generate(prompt, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **options)
        )
    assert torch.equal(*tokens)


def test_cached_steps_equal_the_whole_sequence(mixture, ids):
    whole = mixture(ids).logits
    cache, steps = None, []
    for position in range(ids.shape[1]):
        output = mixture(ids[:, position : position + 1], cache=cache, use_cache=True)
        cache = output.cache
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_shared_prefix_is_computed_once(mixture, ids):
    prefix = mixture(ids[:, :6], use_cache=True).cache
    prefix.batch_repeat_interleave(2)
    endings = (
        torch.cat([ids[:, 6:], ids[:, 6:].flip(1)]).view(2, 2, 3).transpose(0, 1).reshape(4, 3)
    )
    output = mixture(endings, cache=prefix)
    whole = mixture(torch.cat([ids[:, :6].repeat_interleave(2, 0), endings], dim=1)).logits[:, 6:]
    torch.testing.assert_close(output.logits, whole, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=10)
@given(
    num_pad=st.integers(0, 8),
    batch=st.integers(1, 5),
    implementation=st.sampled_from(["eager", "fastest"]),
)
def test_a_sample_gives_the_same_logits_in_any_company(num_pad, batch, implementation):
    mixture = make_mixture()
    mixture.set_experts_implementation(implementation)
    generator = torch.Generator().manual_seed(batch)
    ids, mask = left_padded(torch.randint(1, 99, (batch, 9), generator=generator), num_pad)
    alone = mixture(ids[:1, num_pad:]).logits
    torch.testing.assert_close(
        mixture(ids, attention_mask=mask).logits[:1, num_pad:], alone, atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
def test_compiled_decode_step_equals_the_plain_one(ids):
    mixture = make_mixture(num_hidden_layers=2)

    def decode(forward):
        cache = StaticCache(config=mixture.config, max_cache_len=16)
        steps = [mixture(ids[:, :5], cache=cache, use_cache=True).logits[:, -1:]]
        for position in range(5, 9):
            step = ids[:, position : position + 1]
            where = torch.full((2, 1), position)
            steps.append(forward(step, position_ids=where, cache=cache, use_cache=True).logits)
        return torch.cat(steps, dim=1)

    with torch.no_grad():
        compiled = decode(torch.compile(mixture, fullgraph=True, dynamic=False))
        torch.testing.assert_close(compiled, decode(mixture), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_generates_close_to_float32(dtype, device, ids):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mixture = make_mixture(initializer_range=0.05)
    exact = mixture(ids).logits
    low = make_mixture(initializer_range=0.05).to(device, dtype)
    logits = low(ids.to(device)).logits
    assert logits.dtype == dtype
    error = (logits.float().cpu() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert low.generate(ids.to(device), max_new_tokens=3, pad_token_id=0).shape[0] == 2


# --- a Hugging Face model ---


@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_comes_back_through_the_auto_classes_bit_for_bit(tied, ids, tmp_path):
    mixture = make_mixture(tie_word_embeddings=tied, meta_expert=True, router_bias=True)
    mixture.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = in_fresh_memory(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert isinstance(loaded, LlamaMoeForCausalLM)
    assert torch.equal(loaded(ids).logits, mixture(ids).logits)
    base = in_fresh_memory(AutoModel.from_pretrained(tmp_path))
    assert isinstance(base, LlamaMoeModel)
    assert torch.equal(base(ids).last_hidden_state, mixture.model(ids).last_hidden_state)


def test_router_stays_float32_in_a_bfloat16_model(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    loaded = LlamaMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "model.layers.0.mlp.gate.weight",
        "model.layers.2.mlp.gate.weight",
    }


def test_frozen_router_is_still_frozen_after_loading(tmp_path):
    make_mixture(router_frozen=True).save_pretrained(tmp_path)
    loaded = LlamaMoeForCausalLM.from_pretrained(tmp_path)
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}


def test_experts_implementation_is_fastest_unless_asked_otherwise(mixture, tmp_path):
    assert mixture.config._experts_implementation == "fastest"
    mixture.save_pretrained(tmp_path)
    assert LlamaMoeForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "fastest"
    loaded = LlamaMoeForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    assert loaded.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="quickest"):
        LlamaMoeForCausalLM.from_pretrained(tmp_path, experts_implementation="quickest")


def test_missing_expert_is_an_error_and_not_random(mixture, tmp_path):
    state_dict = mixture.state_dict()
    del state_dict["model.layers.2.mlp.experts.down_proj"]
    mixture.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(
        ValueError, match=r"missing keys: model\.layers\.2\.mlp\.experts\.down_proj\."
    ):
        LlamaMoeForCausalLM.from_pretrained(tmp_path)


def test_expert_of_another_shape_is_an_error(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_experts=8)
    with pytest.raises(
        ValueError, match=r"mismatched keys: .*experts.down_proj.*4, 32, 48.*8, 32, 48.* and 1 more"
    ):
        LlamaMoeForCausalLM.from_pretrained(tmp_path, config=config)


def test_dense_checkpoint_is_not_loaded_as_a_mixture(dense_folder):
    with pytest.raises(ValueError, match=r"upcycle\(source\)"):
        LlamaMoeForCausalLM.from_pretrained(dense_folder)
    config = LlamaMoeConfig(
        **{**AutoConfig.from_pretrained(dense_folder).to_dict(), "model_type": "llama_moe"}
    )
    with pytest.raises(ValueError, match=r"missing keys: .* and 1 more\..*upcycle\(source\)"):
        LlamaMoeForCausalLM.from_pretrained(dense_folder, config=config)


def test_nested_in_another_model_it_keeps_kernel_router_dtype_and_recording(tmp_path, ids):
    class ParentConfig(LlamaMoeConfig):
        model_type = "parent_of_llama_moe"

    class Parent(PreTrainedModel):
        config_class = ParentConfig
        base_model_prefix = "model"

        def __init__(self, config):
            super().__init__(config)
            self.language_model = AutoModel.from_config(
                LlamaMoeConfig(**make_mixture().config.to_dict())
            )
            self.post_init()

    Parent(ParentConfig()).save_pretrained(tmp_path)
    parent = Parent.from_pretrained(tmp_path, dtype=torch.bfloat16)
    language_model = parent.language_model
    assert language_model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert language_model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert language_model.config._experts_implementation == "fastest"
    assert len(language_model(ids, output_router_logits=True).router_logits) == 2


def test_load_balancing_loss_of_the_model_feeds_the_trainers_aux_loss(mixture, ids):
    output = mixture.train()(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, load_balancing_loss(output.router_logits, 4, 2))


def test_import_loads_no_training_or_quantisation_library():
    code = (
        # transformers' Llama loads torchao if it can
        "import sys, transformers.models.llama.modeling_llama; before = set(sys.modules);"
        "import moellava.model.language_model;"
        "names = {'peft', 'torchao', 'bitsandbytes', 'deepspeed', 'trl'};"
        "print(sorted(names & (sys.modules.keys() - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_decoders_arguments_have_names():
    """vLLM asks which arguments `forward` has before it starts."""
    ours, llamas = (
        inspect.signature(model.forward).parameters for model in (LlamaMoeModel, LlamaModel)
    )
    assert list(ours) == list(llamas)
