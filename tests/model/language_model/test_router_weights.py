"""One trained router for every layer, from the files that Med-MoE publishes."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moellava.model.language_model import LlamaMoeConfig, load_router, upcycle
from moellava.model.language_model.router_weights import read_router


@pytest.fixture
def trained_router():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(32, 4))


@pytest.fixture(params=["pth", "safetensors", "tensors"])
def source(request, trained_router, tmp_path):
    state_dict = {f"fc1.{name[2:]}": value for name, value in trained_router.state_dict().items()}
    if request.param == "pth":
        torch.save(state_dict, tmp_path / "phi_router.pth")
        return tmp_path / "phi_router.pth"
    if request.param == "safetensors":
        save_file(state_dict, tmp_path / "router.safetensors")
        return tmp_path / "router.safetensors"
    return state_dict


def test_one_router_goes_into_every_sparse_layer(source, trained_router, dense_folder):
    mixture = upcycle(
        dense_folder, router=source, router_bias=True, router_frozen=True, dtype=torch.bfloat16
    )
    for layer in (0, 2):
        gate = mixture.model.layers[layer].mlp.gate
        assert torch.equal(gate.weight, trained_router[0].weight)
        assert torch.equal(gate.bias, trained_router[0].bias)
        assert not gate.weight.requires_grad
    first, second = (mixture.model.layers[layer].mlp.gate.weight for layer in (0, 2))
    assert first.data_ptr() != second.data_ptr()


def test_router_can_be_loaded_into_a_finished_model(source, trained_router, dense_folder):
    mixture = upcycle(dense_folder, router_bias=True)
    load_router(mixture, source)
    assert torch.equal(mixture.model.layers[2].mlp.gate.bias, trained_router[0].bias)
    assert torch.equal(mixture.model.layers[2].mlp.gate.weight, trained_router[0].weight)


@pytest.mark.parametrize(
    "fields", [{"router_bias": False}, {"num_experts": 8}, {"hidden_size": 64}]
)
def test_router_that_does_not_fit_names_both_shapes(source, fields):
    config = LlamaMoeConfig(
        **{"hidden_size": 32, "router_bias": True, "num_attention_heads": 4, **fields}
    )
    with pytest.raises(ValueError, match=r"fc1\.weight': \(4, 32\).*need"):
        read_router(source, config)


def test_missing_router_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no router file.*router\.pth"):
        read_router(tmp_path / "router.pth", LlamaMoeConfig())
