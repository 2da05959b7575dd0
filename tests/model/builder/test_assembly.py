import pytest
import torch

from moellava.model.builder_enhanced import (
    load_pretrained_model,
)
from moellava.testing import BIOMEDCLIP, OPENAI_CLIP, REVISION, TINYLLAMA

MISSION = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": BIOMEDCLIP, "mm_hidden_size": 768}


def test_patch_tokens_equal_timm_and_differ_from_each_other(loaded, images, small_biomedclip):
    import timm

    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    stored = torch.load(small_biomedclip / "open_clip_pytorch_model.bin", weights_only=True)
    prefix = "visual.trunk."
    trunk.load_state_dict(
        {k[len(prefix) :]: v for k, v in stored.items() if k.startswith(prefix)}, strict=True
    )
    pixels = loaded.image_processor(images, return_tensors="pt")["pixel_values"]

    with torch.no_grad():
        ours = loaded.model.get_image_features(pixels, return_dict=True).last_hidden_state
        options = {"norm": False, "output_fmt": "NLC", "intermediates_only": True}
        (theirs,) = trunk.forward_intermediates(pixels, indices=[10], **options)
        (last,) = trunk.forward_intermediates(pixels, indices=[11], **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - last).abs().max() > 0.1  # the oracle can say no
    assert ours.std(dim=1).min() > 1e-3


@pytest.mark.parametrize("moe_config", [True, {"moe_layers": "dense", "num_experts": 3}, False])
def test_text_logits_equal_the_dense_llamas(parts, hub_cache, moe_config):
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = load_pretrained_model(parts, moe_config=moe_config, dtype="float32").model
    llama = LlamaForCausalLM.from_pretrained(TINYLLAMA, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(TINYLLAMA)(
        "Is there a fracture in the left hand?", return_tensors="pt"
    )
    with torch.no_grad():
        ours, theirs = model(**ids).logits, llama(**ids).logits
    torch.testing.assert_close(ours[..., :32000], theirs, rtol=0, atol=2e-6)


def test_the_added_row_is_the_mean_of_the_others(loaded):
    for embedding in (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()):
        weight = embedding.weight.detach()
        torch.testing.assert_close(weight[32000], weight[:32000].mean(0), rtol=0, atol=1e-4)


def test_same_seed_same_weights(parts):
    first, second, third = (
        load_pretrained_model(parts, seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    differing = {key for key in first if not torch.equal(first[key], third[key])}
    assert differing == {key for key in first if "projector" in key or ".gate.weight" in key}


def test_the_revision_of_the_language_model_is_looked_for_and_recorded(parts):
    assert (
        load_pretrained_model(parts, revision=REVISION).model.config.language_model_revision
        == REVISION
    )
    with pytest.raises(OSError, match=TINYLLAMA):
        load_pretrained_model(parts, revision="e" * 40)


def test_a_broken_tower_falls_back_only_on_request(parts, hub_cache, tmp_path, caplog):
    (tmp_path / "biomedclip_broken").mkdir()
    broken = parts | {"mm_vision_tower": str(tmp_path / "biomedclip_broken")}
    with pytest.raises((OSError, ValueError), match="biomedclip_broken"):
        load_pretrained_model(broken, encoder_type="biomedclip")
    model = load_pretrained_model(broken, encoder_type="biomedclip", fallback_to_default=True).model
    assert model.config.vision_config.tower == BIOMEDCLIP
    assert "INSTEAD" in caplog.text


class TestBadInput:
    def test_a_vision_tower_is_no_language_model(self, parts, hub_cache):
        with pytest.raises(ValueError, match="'clip'"):
            load_pretrained_model(parts | {"model_name_or_path": OPENAI_CLIP})
