"""One trained router for every layer, from the files that Med-MoE publishes."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moellava.model.language_model import LlamaMoeConfig, load_router, upcycle, write_router
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


@pytest.fixture
def written(trained_router, tmp_path):
    weights = {name[2:]: value for name, value in trained_router.state_dict().items()}
    file = tmp_path / "router.safetensors"
    write_router(file, weights, layers=[0, 2], labels=["CT", "MR", "US", "histology"])
    return file


def test_labels_of_the_experts_are_kept_in_the_model(written, dense_folder, tmp_path):
    mixture = upcycle(dense_folder, router=written, router_bias=True, router_frozen=True)
    mixture.save_pretrained(tmp_path / "mixture")
    config = LlamaMoeConfig.from_pretrained(tmp_path / "mixture")
    assert config.expert_labels == ["CT", "MR", "US", "histology"]
    later = upcycle(dense_folder, router_bias=True)
    assert later.config.expert_labels is None
    load_router(later, written)
    assert later.config.expert_labels == ["CT", "MR", "US", "histology"]


def test_a_router_for_other_layers_is_refused(written, dense_folder):
    message = (
        r"trained for the layers \[0, 2\], but the sparse layers are \[1, 3\].*moe_layers=\[0, 2\]"
    )
    with pytest.raises(ValueError, match=message):
        upcycle(dense_folder, router=written, router_bias=True, moe_layers=[1, 3])


def test_a_frozen_router_is_never_random(dense_folder):
    with pytest.raises(ValueError, match=r"without router=\.\.\. it is random.*moe\.router"):
        upcycle(dense_folder, router_frozen=True)


def test_as_many_labels_as_experts_are_needed():
    with pytest.raises(ValueError, match="expert_labels has 2 labels, but there are num_experts=4"):
        LlamaMoeConfig(expert_labels=["CT", "MR"])
