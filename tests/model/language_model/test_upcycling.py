"""A dense checkpoint becomes a mixture with the same logits, and an untrained one dense again."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from moellava.model.language_model import (
    LlamaMoeConfig,
    LlamaMoeForCausalLM,
    layers_with_differing_experts,
    moe_config_from_dense,
    to_dense,
    upcycle,
    upcycled_state_dict,
)
from moellava.testing import TINYLLAMA, in_fresh_memory

KEPT = {
    "default": {},
    "all layers": {"moe_layers": "dense"},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "all experts, raw": {"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "halves": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "quarters, two copies": {
        "moe_intermediate_size": 16,
        "num_experts": 16,
        "num_experts_per_tok": 8,
    },
    "med-moe": {
        "meta_expert": True,
        "norm_topk_prob": False,
        "num_experts_per_tok": 1,
        "router_bias": True,
    },
}
LLAMAS = {
    "TinyLlama": {},
    "SmolLM2": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "Llama-3.2": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_logits_equal_the_dense_models(options, make_dense, dense_folder, ids):
    mixture = upcycle(dense_folder, **options)
    torch.testing.assert_close(mixture(ids).logits, make_dense()(ids).logits, atol=2e-5, rtol=1e-5)
    assert not mixture.training


@pytest.mark.parametrize("fields", LLAMAS.values(), ids=LLAMAS)
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["one file", "shards"])
def test_every_llama_keeps_its_logits_and_greedy_tokens(
    fields, shard_size, make_dense, ids, tmp_path
):
    dense = make_dense(**fields)
    dense.save_pretrained(tmp_path, max_shard_size=shard_size)
    mixture = in_fresh_memory(upcycle(tmp_path))
    torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, atol=2e-5, rtol=1e-5)
    options = {"max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(mixture.generate(ids, **options), dense.generate(ids, **options))
    assert (
        mixture.lm_head.weight is mixture.model.embed_tokens.weight
    ) is dense.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_close_to_the_dense_models(dtype, make_dense, dense_folder, ids):
    mixture, dense = upcycle(dense_folder, dtype=dtype), make_dense().to(dtype)
    assert mixture.dtype == dtype
    error = (mixture(ids).logits.float() - dense(ids).logits.float()).norm() / dense(
        ids
    ).logits.float().norm()
    assert error < 0.03


def test_real_repo_id_is_upcycled_from_the_cache_without_network(hub_cache, no_network):
    mixture, dense = (
        upcycle(TINYLLAMA, dtype=torch.float32),
        LlamaForCausalLM.from_pretrained(TINYLLAMA).float(),
    )
    prompt = torch.arange(300, 312)[None]
    torch.testing.assert_close(mixture(prompt).logits, dense(prompt).logits, atol=1e-5, rtol=1e-5)
    assert upcycle(TINYLLAMA).dtype == torch.bfloat16


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.integers(1, 3),
    copies=st.integers(1, 3),
    pieces=st.sampled_from([1, 2, 4]),
    data=st.data(),
    tied=st.booleans(),
    heads=st.sampled_from([2, 4]),
)
def test_any_configuration_keeps_the_function(
    layers, copies, pieces, data, tied, heads, make_dense, tmp_path_factory
):
    chosen = data.draw(st.lists(st.integers(0, layers - 1), min_size=1, unique=True))
    used = data.draw(st.integers(1, copies))
    folder = tmp_path_factory.mktemp("dense")
    dense = make_dense(
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        num_attention_heads=heads,
        num_key_value_heads=2,
    )
    dense.save_pretrained(folder)
    mixture = upcycle(
        folder,
        moe_layers=chosen,
        num_experts=copies * pieces,
        num_experts_per_tok=used * pieces,
        moe_intermediate_size=64 // pieces,
    )
    ids = torch.randint(1, 99, (2, 6), generator=torch.Generator().manual_seed(layers))
    torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(
        to_dense(mixture)(ids).logits, dense(ids).logits, atol=1e-6, rtol=1e-6
    )


def test_state_dict_has_exactly_the_models_keys_and_no_shared_memory(dense_folder):
    config = moe_config_from_dense(
        LlamaConfig.from_pretrained(dense_folder), meta_expert=True, router_bias=True
    )
    state_dict = upcycled_state_dict(dense_folder, config)
    assert state_dict.keys() == LlamaMoeForCausalLM(config).state_dict().keys()
    experts = state_dict["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.is_contiguous()
    assert experts.untyped_storage().nbytes() == experts.numel() * experts.element_size()
    pointers = [
        value.untyped_storage().data_ptr() for name, value in state_dict.items() if ".mlp." in name
    ]
    assert len(set(pointers)) == len(pointers)


def test_tied_state_dict_has_no_head(make_dense, tmp_path):
    make_dense(tie_word_embeddings=True).save_pretrained(tmp_path)
    state_dict = upcycled_state_dict(
        tmp_path, moe_config_from_dense(LlamaConfig.from_pretrained(tmp_path))
    )
    assert "lm_head.weight" not in state_dict


def test_router_is_float32_seeded_and_does_not_touch_the_global_generator(dense_folder):
    state = torch.random.get_rng_state()
    first, again, other = (
        upcycle(dense_folder, seed=seed, dtype=torch.bfloat16) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [model.model.layers[0].mlp.gate.weight for model in (first, again, other)]
    assert weights[0].dtype == torch.float32
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], first.model.layers[2].mlp.gate.weight)


def test_noise_is_seeded_and_sized_relative_to_the_weights(dense_folder, make_dense):
    exact, first, again = (upcycle(dense_folder, noise=noise, seed=3) for noise in (0.0, 0.1, 0.1))
    weights = [model.model.layers[0].mlp.experts.down_proj for model in (exact, first, again)]
    difference = weights[1] - weights[0]
    assert difference.std().item() == pytest.approx(0.1 * weights[0].std().item(), rel=0.1)
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(difference[0], difference[1])
    assert layers_with_differing_experts(first) == [0, 2]


def test_meta_expert_is_the_copy_and_the_others_add_nothing_yet(dense_folder, make_dense):
    mixture = upcycle(dense_folder, meta_expert=True)
    mlp: LlamaMLP = make_dense().model.layers[0].mlp
    block = mixture.model.layers[0].mlp
    assert torch.equal(block.meta_expert.up_proj.weight, mlp.up_proj.weight)
    assert torch.equal(block.experts.gate_up_proj[3, :64], mlp.gate_proj.weight)
    assert not block.experts.down_proj.any()


def test_function_can_be_given_up_as_med_moe_does(dense_folder, make_dense, ids):
    options = {"norm_topk_prob": False, "num_experts_per_tok": 1}
    with pytest.raises(
        ValueError, match=r"norm_topk_prob=True, add meta_expert=True.*keep_function=False"
    ):
        upcycle(dense_folder, **options)
    mixture = upcycle(dense_folder, keep_function=False, meta_expert=True, **options)
    mlp = make_dense().model.layers[0].mlp
    assert torch.equal(mixture.model.layers[0].mlp.experts.down_proj[2], mlp.down_proj.weight)
    assert not torch.allclose(mixture(ids).logits, make_dense()(ids).logits, atol=1e-2)


def test_split_experts_cost_what_the_dense_mlp_costs(dense_folder):
    mixture = upcycle(dense_folder, moe_intermediate_size=16, num_experts=16, num_experts_per_tok=4)
    experts = mixture.model.layers[0].mlp.experts
    active = 4 * (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel())
    assert active == sum(
        p.numel() for p in LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64)).parameters()
    )


def test_the_decision_is_logged(dense_folder, caplog):
    with caplog.at_level(logging.INFO):
        upcycle(dense_folder, num_experts=6)
    assert "2 of 4 layers upcycled to 6 experts, top-2, router random" in caplog.text


def test_untrained_mixture_becomes_the_dense_checkpoint_again(
    dense_folder, make_dense, ids, tmp_path
):
    dense = to_dense(upcycle(dense_folder))
    dense.save_pretrained(tmp_path / "again")
    loaded = in_fresh_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(ids).logits, make_dense()(ids).logits)


def test_dense_model_is_independent_of_the_mixture(dense_folder):
    mixture = upcycle(dense_folder)
    dense = to_dense(mixture)
    mixture.model.embed_tokens.weight.data.zero_()
    assert dense.model.embed_tokens.weight.any()


def test_trained_mixture_does_not_become_dense(dense_folder):
    mixture = upcycle(dense_folder)
    mixture.model.layers[2].mlp.experts.down_proj.data[1, 0, 0] += 1
    assert layers_with_differing_experts(mixture) == [2]
    with pytest.raises(ValueError, match=r"layers \[2\] differ"):
        to_dense(mixture)


def test_split_mixture_whose_router_parts_its_pieces_is_not_dense(dense_folder):
    mixture = upcycle(dense_folder, moe_intermediate_size=32, num_experts=8)
    assert layers_with_differing_experts(mixture) == []
    mixture.model.layers[0].mlp.gate.weight.data[1] += 1
    assert layers_with_differing_experts(mixture) == [0]


def test_meta_expert_mixture_does_not_become_dense(dense_folder):
    with pytest.raises(ValueError, match="meta expert"):
        to_dense(upcycle(dense_folder, meta_expert=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_exprts": 8}, "Unknown mixture option 'num_exprts'. Did you mean 'num_experts'"),
        ({"hidden_size": 64}, "Unknown mixture option 'hidden_size'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"moe_layers": [7]}, r"\[7\], but the model has layers 0 to 3"),
        (
            {"moe_intermediate_size": 24},
            "moe_intermediate_size=24 does not divide.*intermediate_size=64",
        ),
        (
            {"moe_intermediate_size": 16, "num_experts": 16},
            "num_experts_per_tok=2 is not a multiple of 4",
        ),
        ({"moe_intermediate_size": 32, "num_experts": 5}, "num_experts=5 is not a multiple of 2"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"noise": float("inf")}, "noise is inf"),
        ({"num_experts": 10**9}, r"num_experts asks for 1,000,000,000.*MOELLAVA_MAX_EXPERTS="),
    ],
)
def test_impossible_options_are_refused(options, message, dense_folder):
    with pytest.raises(ValueError, match=message):
        upcycle(dense_folder, **options)


def test_other_architecture_is_refused_by_name(tmp_path):
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        upcycle(tmp_path)
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        moe_config_from_dense(GPT2Config())


def test_mixture_is_not_upcycled_twice(dense_folder, tmp_path):
    upcycle(dense_folder).save_pretrained(tmp_path / "mixture")
    with pytest.raises(
        ValueError, match=r"already a mixture of experts.*LlamaMoeForCausalLM\.from_pretrained"
    ):
        upcycle(tmp_path / "mixture")


@pytest.mark.parametrize(
    ("name", "value"), [("rms_norm_eps", 1e-3), ("num_hidden_layers", 3), ("vocab_size", 100)]
)
def test_config_of_another_llama_is_refused(name, value, dense_folder):
    fields = moe_config_from_dense(LlamaConfig.from_pretrained(dense_folder)).to_dict() | {
        name: value
    }
    with pytest.raises(ValueError, match=f"config says {name}={value}"):
        upcycled_state_dict(dense_folder, LlamaMoeConfig(**fields))
