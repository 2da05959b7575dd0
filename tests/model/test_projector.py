import pytest
import torch

from moellava.model.projector import build_projector, num_projected_tokens


def test_mlp2x_gelu_is_transformers_llava_projector():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=12), text_config=LlamaConfig(hidden_size=20, num_attention_heads=4)
    )
    theirs = LlavaMultiModalProjector(config)
    ours = build_projector("mlp2x_gelu", 12, 20)
    names = {"linear_1": "0", "linear_2": "2"}
    ours.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()})
    tokens = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(("projector_type", "num_linear"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)])
def test_every_projector_maps_width_to_width(projector_type, num_linear):
    projector = build_projector(projector_type, 12, 20)
    assert projector(torch.randn(2, 7, 12)).shape == (2, num_projected_tokens(projector_type, 7), 20)
    assert sum(isinstance(module, torch.nn.Linear) for module in projector.modules()) == num_linear


def test_identity_needs_equal_widths():
    tokens = torch.randn(2, 7, 12)
    assert build_projector("identity", 12, 12)(tokens) is tokens
    with pytest.raises(ValueError, match="12 channels and the language model's embeddings 20"):
        build_projector("identity", 12, 20)


def test_an_unknown_type_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"projector_type 'linaer'\. Did you mean 'linear'\?"):
        build_projector("linaer", 12, 20)
    with pytest.raises(ValueError, match="'mlp0x_gelu'"):
        num_projected_tokens("mlp0x_gelu", 4)
