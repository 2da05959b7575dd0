import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from moellava.model.language_model import LlamaMoeConfig
from moellava.model.language_model.configuration_llama_moe import LAYER_CHOICES


@pytest.mark.parametrize(
    ("choice", "num_layers", "expected"),
    [
        ("sparse", 5, [0, 2, 4]),
        ("dense", 3, [0, 1, 2]),
        ("first_half", 5, [0, 1]),
        ("second_half", 5, [2, 3, 4]),
        ([3, 1], 4, [1, 3]),
    ],
)
def test_layer_choice_names_these_layers(choice, num_layers, expected):
    config = LlamaMoeConfig(moe_layers=choice, num_hidden_layers=num_layers)
    assert config.moe_layer_indices == expected
    assert [index for index in range(num_layers) if config.is_sparse(index)] == expected


def test_every_second_layer_is_sparse_by_default():
    assert LlamaMoeConfig(num_hidden_layers=22).moe_layer_indices == list(range(22))[::2]


@given(num_layers=st.integers(1, 40))
def test_halves_split_the_layers_and_dense_is_both(num_layers):
    first, second = (
        list(LAYER_CHOICES[name](num_layers)) for name in ("first_half", "second_half")
    )
    assert first + second == list(LAYER_CHOICES["dense"](num_layers))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5.*num_experts=4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"moe_layers": [0, 4]}, r"\[4\], but the model has layers 0 to 3"),
        ({"moe_layers": [-1]}, r"\[-1\], but the model has layers 0 to 3"),
        ({"moe_layers": [1, 2, 1]}, r"\[1\] more than once"),
        ({"moe_layers": []}, "chooses none of the 4 layers"),
        ({"moe_layers": "sparce"}, "Unknown moe_layers 'sparce'. Did you mean 'sparse'"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1"),
        ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef is nan"),
        ({"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_impossible_mixture_is_refused_when_the_config_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaMoeConfig(num_hidden_layers=4, **fields)


def test_wrong_type_is_refused_by_name():
    with pytest.raises(StrictDataclassFieldValidationError, match="num_experts"):
        LlamaMoeConfig(num_experts="4")


def test_config_round_trips_through_auto_config(tmp_path):
    config = LlamaMoeConfig(
        moe_layers=[1, 3],
        num_hidden_layers=4,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        moe_intermediate_size=24,
        meta_expert=True,
        router_bias=True,
        router_frozen=True,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.25,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LlamaMoeConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_dense_config_is_not_read_as_a_mixture(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'llama' config.*upcycle\(source\)"):
        LlamaMoeConfig.from_pretrained(tmp_path)
