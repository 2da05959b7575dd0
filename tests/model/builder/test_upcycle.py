"""A loaded dense model becomes a mixture."""

import pytest
import torch

from moellava.model.builder.upcycle import upcycle_loaded
from moellava.model.builder_enhanced import load_pretrained_model


@pytest.fixture(scope="module")
def dense(parts):
    return load_pretrained_model(parts, moe_config=False, dtype="float32")


def test_the_mixture_computes_what_the_dense_model_does(dense, images):
    inputs = dense.processor(text="<image> Why?", images=images[0], return_tensors="pt")
    with torch.no_grad():
        expected = dense.model(**inputs).logits
    mixture = upcycle_loaded(dense, {"num_experts": 3}, seed=1)
    assert mixture.model.config.text_config.num_experts == 3
    assert mixture.model.built_from == dense.model.built_from
    assert mixture.processor is dense.processor
    with torch.no_grad():
        torch.testing.assert_close(mixture.model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_other_weights_share_their_memory(dense):
    mixture = upcycle_loaded(dense)
    ours = dict(mixture.model.model.vision_tower.named_parameters())
    for name, parameter in dense.model.model.vision_tower.named_parameters():
        assert ours[name].data_ptr() == parameter.data_ptr(), name


def test_a_mixture_is_not_upcycled_again(loaded):
    with pytest.raises(ValueError, match=r"mixture"):
        upcycle_loaded(loaded)
