"""BiomedClipEncoder against timm and open_clip on the same weights."""

import logging
import shutil
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, BertConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from moellava.encoders import BiomedClipEncoder, BiomedClipVisionConfig
from moellava.testing import (
    BIOMEDBERT,
    BIOMEDCLIP,
    REVISION,
    fill_hub_cache,
    in_fresh_memory,
    write_biomedclip,
)
from tests.encoders.architectures import timm_trunk
from tests.encoders.conftest import open_clip_model


@pytest.fixture(autouse=True)
def no_gradients(request):
    """Inference, as the oracles: torch's attention differs when gradients are recorded."""
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def random_pixels(encoder, batch: int = 2) -> torch.Tensor:
    return torch.randn(
        batch, 3, *encoder.config.image_hw, generator=torch.Generator().manual_seed(1)
    )


def blocks_of(visual) -> list:
    """The modules whose outputs are the hidden states, named by hand: what the oracle knows."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        if hasattr(visual, "transformer"):
            return list(visual.transformer.resblocks)
        return [visual.avgpool, visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    if hasattr(trunk, "blocks"):
        return list(trunk.blocks)
    if hasattr(trunk, "stages"):
        return list(trunk.stages)
    if hasattr(trunk, "layer1"):
        return [trunk.act1, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    return list(trunk.layers)


@torch.no_grad()
def encode_image(model, pixels: torch.Tensor) -> torch.Tensor:
    pooled = model.visual(pixels)
    return pooled[0] if isinstance(pooled, tuple) else pooled  # CoCa's tower also returns tokens


@torch.no_grad()
def hooked(model, pixels: torch.Tensor, index: int) -> torch.Tensor:
    """What block `index` returned while open_clip's own encode_image ran."""
    seen = []
    hook = blocks_of(model.visual)[index].register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    model.visual(pixels)
    hook.remove()
    return seen[0]


def flat(name: str, hidden: torch.Tensor, num_patches: int) -> torch.Tensor:
    """A block's output as patch tokens: the last N tokens, or the map row by row."""
    if name == "timm_swin":
        return hidden.flatten(1, 2)  # (B, H, W, C)
    return hidden.flatten(2).mT if hidden.ndim == 4 else hidden[:, -num_patches:]


# ---- real tokens ----


def test_patch_tokens_equal_a_hook_in_open_clips_own_forward(repo):
    name = repo.name.removeprefix("open_clip_")
    encoder, model = BiomedClipEncoder.from_pretrained(repo), open_clip_model(repo)
    pixels = random_pixels(encoder)
    output = encoder(pixels)
    expected = flat(name, hooked(model, pixels, -2), encoder.num_patches)
    assert torch.equal(output.patch_tokens, expected)
    assert output.patch_tokens.shape == (2, encoder.num_patches, encoder.hidden_size)
    assert encoder.grid[0] * encoder.grid[1] == encoder.num_patches
    assert output.synthesized is False
    assert output.pooled is None
    other = flat(name, hooked(model, pixels, -1), encoder.num_patches)  # the oracle can say no
    assert other.shape != expected.shape or not torch.allclose(other, expected)


def test_pooled_equals_encode_image(repo):
    encoder, model = BiomedClipEncoder.from_pretrained(repo), open_clip_model(repo)
    pixels = random_pixels(encoder)
    output = encoder(pixels, output_pooled=True)
    assert torch.equal(output.pooled, encode_image(model, pixels))
    assert torch.equal(output.patch_tokens, encoder(pixels).patch_tokens)


def test_tokens_of_one_image_differ_between_patches(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo)
    tokens = encoder(random_pixels(encoder)).patch_tokens
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-3


def test_bfloat16_tower_equals_open_clips_bfloat16(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo, dtype=torch.bfloat16)
    model = open_clip_model(repo).to(torch.bfloat16)
    pixels = random_pixels(encoder).to(torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    output = encoder(pixels, output_pooled=True)
    assert torch.equal(output.pooled, encode_image(model, pixels))
    expected = flat(
        repo.name.removeprefix("open_clip_"), hooked(model, pixels, -2), encoder.num_patches
    )
    assert torch.equal(output.patch_tokens, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_tower_equals_open_clips(repo, dtype):
    encoder = BiomedClipEncoder.from_pretrained(repo, device="cuda", dtype=dtype)
    model = open_clip_model(repo).to("cuda", dtype)
    pixels = random_pixels(encoder).to("cuda", dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels, output_pooled=True).pooled, encode_image(model, pixels)
        )


def test_tokens_equal_timms_forward_intermediates_for_every_layer(architecture):
    repo = architecture("biomedclip")
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    state = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True)
    prefix = "visual.trunk."
    trunk.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    encoder = BiomedClipEncoder.from_pretrained(repo)
    pixels = random_pixels(encoder)
    with torch.no_grad():
        expected = trunk.forward_intermediates(
            pixels, norm=False, output_fmt="NLC", intermediates_only=True
        )
        for index in range(12):
            for layer in (
                index - 12,
                index + 1,
            ):  # LLaVA counts hidden states from the embeddings on
                encoder.config.select_layer = layer
                assert torch.equal(encoder(pixels).patch_tokens, expected[index])


@pytest.mark.real_size
@pytest.mark.slow
def test_real_size_biomedclip_pickle_gives_timms_tokens(tmp_path):
    (repo,) = fill_hub_cache(tmp_path, [BIOMEDCLIP], full_text=True).values()
    pickled = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True, mmap=True)
    weights = [value for value in pickled.values() if value.is_floating_point()]
    assert sum(value.numel() for value in weights) == 195_902_721  # the published file's
    encoder = BiomedClipEncoder.from_pretrained(BIOMEDCLIP, cache_dir=tmp_path)
    assert (encoder.num_patches, encoder.hidden_size, encoder.grid) == (196, 768, (14, 14))
    assert sum(p.numel() for p in encoder.parameters()) == 85_798_656 + 393_216
    assert (encoder.config.tower, encoder.config.revision) == (BIOMEDCLIP, REVISION)
    config = (
        repo / "open_clip_config.json"
    )  # open_clip itself builds the text tower too: show it a BERT of that size
    BertConfig().save_pretrained(tmp_path / "bert")
    config.write_text(
        config.read_text().replace(
            f'"hf_model_name": "{BIOMEDBERT}"', f'"hf_model_name": "{tmp_path}/bert"'
        )
    )
    model = open_clip_model(repo)
    pixels = random_pixels(encoder)
    assert torch.equal(encoder(pixels).patch_tokens, hooked(model, pixels, 10)[:, 1:])
    assert torch.equal(encoder(pixels, output_pooled=True).pooled, encode_image(model, pixels))


@pytest.mark.real_size
@pytest.mark.slow
def test_real_size_vit_large_gives_timms_tokens(tmp_path):
    name, prefix = "vit_large_patch14_224", "visual.trunk."
    repo = write_biomedclip(
        tmp_path / "biomedclip_large", vision=name, image_size=224, embed_dim=768
    )
    state = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True, mmap=True)
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0).eval()
    weights = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    trunk.load_state_dict(weights, assign=True)
    for image_size, num_patches in (
        (224, 256),
        (336, 576),
    ):  # timm's trunk follows from one to the other
        encoder = BiomedClipEncoder.from_pretrained(repo, image_size=image_size)
        assert (encoder.num_patches, encoder.hidden_size) == (num_patches, 1024)
        trunk.set_input_size(image_size)
        pixels = random_pixels(encoder)[:1]
        with torch.no_grad():
            (expected,) = trunk.forward_intermediates(
                pixels,
                indices=[22],
                norm=False,
                output_fmt="NLC",
                intermediates_only=True,
                stop_early=True,
            )
            assert torch.equal(encoder(pixels).patch_tokens, expected)


# ---- selection ----


def test_select_feature_names_what_llava_means(architecture):
    repo = architecture("biomedclip")
    model = open_clip_model(repo)
    encoder = BiomedClipEncoder.from_pretrained(repo)
    pixels = random_pixels(encoder)
    hidden = hooked(model, pixels, -2)  # (B, 1 + 196, D)
    expected = {"patch": hidden[:, 1:], "cls_patch": hidden, "cls": hidden[:, :1]}
    expected |= {"default": expected["patch"], "full": expected["cls_patch"]}
    for feature, tokens in expected.items():
        encoder = BiomedClipEncoder.from_pretrained(repo, select_feature=feature)
        assert torch.equal(encoder(pixels).patch_tokens, tokens)
        assert encoder.num_patches == encoder.config.num_patches == tokens.shape[1]
        assert encoder.grid == (14, 14)


def test_list_of_layers_concatenates_along_the_width(architecture):
    repo = architecture("vit")
    encoder = BiomedClipEncoder.from_pretrained(
        repo, select_layer=[-1, 1, -2], select_feature="cls_patch"
    )
    pixels = random_pixels(encoder)
    model = open_clip_model(repo)
    expected = torch.cat([hooked(model, pixels, index) for index in (-1, 0, -2)], dim=-1)
    assert torch.equal(encoder(pixels).patch_tokens, expected)
    assert encoder.hidden_size == 3 * 64


def test_final_norm_is_the_trunks_own(architecture):
    for name, norm in (("biomedclip", "trunk.norm"), ("vit", "ln_post")):
        repo = architecture(name)
        encoder = BiomedClipEncoder.from_pretrained(repo, final_norm=True)
        pixels, model = random_pixels(encoder), open_clip_model(repo)
        expected = model.visual.get_submodule(norm)(hooked(model, pixels, -2))[:, 1:]
        assert torch.equal(encoder(pixels).patch_tokens, expected)
    with pytest.raises(ValueError, match=r"final_norm is True.*no norm that fits"):
        BiomedClipEncoder.from_pretrained(architecture("timm_resnet"), final_norm=True)


def test_blocks_after_the_selected_one_do_not_run(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo)
    ran = []
    for index, block in enumerate(blocks_of(encoder.visual)):
        block.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    encoder(random_pixels(encoder))
    assert ran == list(range(encoder.num_layers - 1))


def test_registers_are_no_patches_and_no_class_token(architecture):
    repo = architecture("timm_register_no_class")
    encoder = BiomedClipEncoder.from_pretrained(repo, select_feature="full")
    assert encoder.num_patches == 100
    for feature in ("cls", "cls_patch"):
        with pytest.raises(ValueError, match=f"{feature!r}, but this trunk has no class token"):
            BiomedClipEncoder.from_pretrained(repo, select_feature=feature)


def test_class_token_is_told_from_registers():
    vision_cfg = timm_trunk("vit_small_patch14_reg4_dinov2", timm_pool="", image_size=518)
    config = BiomedClipVisionConfig(
        vision_cfg=vision_cfg, image_size=56, select_feature="cls_patch"
    )
    encoder = BiomedClipEncoder(config).eval()
    assert encoder.num_patches == 1 + 16
    seen = []
    hook = encoder.visual.trunk.blocks[-2].register_forward_hook(
        lambda *call: seen.append(call[-1])
    )
    tokens = encoder(random_pixels(encoder, 1)).patch_tokens
    hook.remove()
    assert torch.equal(tokens, torch.cat([seen[0][:, :1], seen[0][:, 5:]], dim=1))


@pytest.mark.parametrize("layer", [0, -13, 13, 99])
def test_layer_out_of_range_lists_the_range(architecture, layer):
    with pytest.raises(
        ValueError, match=rf"select_layer is {layer}, but the trunk has 12 layers: use -12 to -1"
    ):
        BiomedClipEncoder.from_pretrained(architecture("biomedclip"), select_layer=layer)


def test_layers_of_different_grids_do_not_join(architecture):
    with pytest.raises(
        ValueError, match=r"joins layers of different grids \[\(5, 5\), \(10, 10\)\]"
    ):
        BiomedClipEncoder.from_pretrained(architecture("timm_convnext"), select_layer=[-1, -2])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "select_feature",
            "patches",
            "select_feature is 'patches'; choose one of 'patch', 'default'",
        ),
        (
            "patch_tokens",
            "fake",
            "patch_tokens is 'fake'; choose one of 'auto', 'real', 'synthesized'",
        ),
        ("select_layer", [], "select_layer is an empty list"),
        ("image_size", [1, 2, 3], r"image_size is \[1, 2, 3\]; give one side"),
        ("image_size", 0, "image_size is 0"),
    ],
)
def test_wrong_settings_list_the_right_ones(field, value, message):
    with pytest.raises(ValueError, match=message):
        BiomedClipVisionConfig(**{field: value})


def test_misspelt_setting_suggests_the_right_one(architecture):
    with pytest.raises(TypeError, match=r"no option 'select_layr'\. Did you mean 'select_layer'\?"):
        BiomedClipEncoder.from_pretrained(architecture("vit"), select_layr=-1)


# ---- synthesized tokens ----


def test_forced_synthesis_repeats_encode_image_and_warns_once(architecture, caplog):
    repo = architecture("biomedclip")
    with caplog.at_level(logging.WARNING, logger="moellava"):
        encoder = BiomedClipEncoder.from_pretrained(repo, patch_tokens="synthesized")
        output = encoder(random_pixels(encoder))
        encoder(random_pixels(encoder))
    warnings = [
        r.message for r in caplog.records if "synthesized" in r.message and r.levelname == "WARNING"
    ]
    assert len(warnings) == 1
    assert "no spatial detail" in warnings[0].replace("  ", " ")
    pooled = encode_image(open_clip_model(repo), random_pixels(encoder))
    assert torch.equal(output.patch_tokens, pooled[:, None].expand(2, 196, 32))
    assert output.synthesized is True
    assert (encoder.hidden_size, encoder.num_patches, encoder.grid) == (32, 196, (14, 14))


# ---- image sizes ----


def test_trained_size_is_unchanged_bit_for_bit(repo):
    plain = BiomedClipEncoder.from_pretrained(repo)
    named = BiomedClipEncoder.from_pretrained(repo, image_size=plain.config.image_hw)
    pixels = random_pixels(plain)
    assert torch.equal(plain(pixels).patch_tokens, named(pixels).patch_tokens)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("biomedclip", 336),
        ("biomedclip", (160, 320)),
        ("timm_eva", 280),
        ("timm_swin", 448),
        ("timm_convnext", (224, 160)),
        ("timm_resnet", 96),
        ("timm_pre_norm", 128),
        ("vit", 96),
        ("vit", (64, 128)),
        ("vit_coca", 128),
    ],
)
def test_other_image_size_equals_open_clips_force_image_size(architecture, name, size):
    repo = architecture(name)
    encoder = BiomedClipEncoder.from_pretrained(repo, image_size=size)
    model = open_clip_model(repo, force_image_size=size)
    pixels = random_pixels(encoder)
    assert pixels.shape[2:] == ((size, size) if isinstance(size, int) else size)
    output = encoder(pixels, output_pooled=True)
    assert torch.equal(output.pooled, encode_image(model, pixels))
    assert output.patch_tokens.shape[1] == encoder.num_patches == encoder.grid[0] * encoder.grid[1]
    crop = encoder.image_processor.crop_size
    assert (crop["height"], crop["width"]) == encoder.config.image_hw


def test_336_pixels_give_441_patches(architecture):
    encoder = BiomedClipEncoder.from_pretrained(architecture("biomedclip"), image_size=336)
    assert (encoder.grid, encoder.num_patches, encoder.image_size) == ((21, 21), 441, 336)


def test_modified_resnet_takes_another_square_and_no_rectangle(architecture):
    repo = architecture("modified_resnet")
    encoder = BiomedClipEncoder.from_pretrained(repo, image_size=128)
    output = encoder(random_pixels(encoder), output_pooled=True)
    assert (encoder.grid, output.pooled.shape) == ((8, 8), (2, 32))
    with pytest.raises(ValueError, match="attention pool only takes squares"):
        BiomedClipEncoder.from_pretrained(repo, image_size=(64, 96))


def test_size_that_the_patches_do_not_divide_is_refused(architecture):
    with pytest.raises(ValueError, match=r"225x225 pixels.*patches of 16x16.*224x224"):
        BiomedClipEncoder.from_pretrained(architecture("biomedclip"), image_size=225)


def test_wrong_pixel_shape_names_both_shapes(architecture):
    encoder = BiomedClipEncoder.from_pretrained(architecture("vit"))
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 64\); expected \(images, 3, 64, 64\)"):
        encoder(torch.zeros(1, 3, 32, 64))


# ---- as a Hugging Face model ----


def test_saved_encoder_reloads_bit_for_bit(repo, tmp_path):
    encoder = BiomedClipEncoder.from_pretrained(repo, select_layer=-1)
    encoder.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is BiomedClipEncoder
    assert not again.training
    pixels = random_pixels(encoder)
    with torch.no_grad():
        for a, b in zip(
            encoder(pixels, True).to_tuple(), again(pixels, True).to_tuple(), strict=True
        ):
            assert a is b if isinstance(a, bool) else torch.equal(a, b)
    assert again.config.to_dict() == encoder.config.to_dict() | {"dtype": "float32"} | {
        k: v
        for k, v in again.config.to_dict().items()
        if k in ("_name_or_path", "architectures", "dtype")
    }


@pytest.mark.parametrize("name", ["biomedclip", "vit", "timm_swin", "modified_resnet"])
def test_saved_encoder_of_another_size_reloads_bit_for_bit(architecture, name, tmp_path):
    size = 448 if name == "timm_swin" else 128
    encoder = BiomedClipEncoder.from_pretrained(architecture(name), image_size=size)
    encoder.save_pretrained(tmp_path)
    again = BiomedClipEncoder.from_pretrained(tmp_path)
    pixels = random_pixels(encoder)
    assert pixels.shape[-1] == size
    expected = in_fresh_memory(encoder)(pixels).patch_tokens
    assert torch.equal(in_fresh_memory(again)(pixels).patch_tokens, expected)
    resized = BiomedClipEncoder.from_pretrained(tmp_path, image_size=2 * size)
    assert resized.num_patches == 4 * encoder.num_patches


def test_config_is_plain_json_and_round_trips(repo):
    config = BiomedClipEncoder.from_pretrained(repo).config
    again = AutoConfig.for_model(**config.to_dict())
    assert type(again) is BiomedClipVisionConfig
    assert again.to_json_string() == config.to_json_string()
    assert str(repo.parent) not in config.to_json_string()
    assert config.tower == repo.name


def test_incomplete_saved_encoder_is_refused_with_the_missing_names(architecture, tmp_path):
    encoder = BiomedClipEncoder.from_pretrained(architecture("biomedclip"))
    state = encoder.state_dict()
    del state["visual.trunk.cls_token"]
    encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ValueError, match=r"do not fit its configuration\. missing keys: visual\.trunk\.cls_token"
    ):
        BiomedClipEncoder.from_pretrained(tmp_path)


class ParentConfig(PreTrainedConfig):
    model_type = "encoder_test_parent"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="biomedclip_vision")
    }
    vision_config: dict | PreTrainedConfig | None = None


class Parent(PreTrainedModel):
    config_class = ParentConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.post_init()


def test_nested_in_a_parent_it_reloads_bit_for_bit(repo, tmp_path):
    encoder = BiomedClipEncoder.from_pretrained(repo)
    parent = Parent(ParentConfig(vision_config=encoder.config.to_dict())).eval()
    parent.vision_tower.load_state_dict(encoder.state_dict())
    parent.save_pretrained(tmp_path)
    again = Parent.from_pretrained(tmp_path, experts_implementation="eager").eval()
    pixels = random_pixels(encoder)
    expected = in_fresh_memory(encoder)(pixels).patch_tokens
    assert torch.equal(in_fresh_memory(again.vision_tower)(pixels).patch_tokens, expected)
    assert again.config.vision_config.num_patches == encoder.num_patches


def test_default_config_is_biomedclip_and_builds_on_meta():
    with torch.device("meta"):
        encoder = BiomedClipEncoder(BiomedClipVisionConfig())
    assert (encoder.num_patches, encoder.hidden_size, encoder.grid) == (196, 768, (14, 14))
    assert encoder.config.num_patches == 196


def test_gradient_reaches_the_pixels_and_frozen_weights_stay_frozen(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo).requires_grad_(False)
    pixels = random_pixels(encoder).requires_grad_()
    encoder(pixels).patch_tokens.square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", ["biomedclip", "vit", "timm_convnext"])
def test_activation_checkpointing_gives_the_same_gradients(architecture, name):
    gradients = []
    for checkpointing in (False, True):
        encoder = BiomedClipEncoder.from_pretrained(architecture(name)).train()
        if checkpointing:
            encoder.activation_checkpointing_enable()
        pixels = random_pixels(encoder).requires_grad_()
        encoder(pixels).patch_tokens.square().mean().backward()
        gradients.append(pixels.grad)
    assert torch.allclose(*gradients, atol=1e-7)


def test_activation_checkpointing_of_a_modified_resnet_is_refused(architecture):
    encoder = BiomedClipEncoder.from_pretrained(architecture("modified_resnet"))
    with pytest.raises(ValueError, match="ModifiedResNet has no activation checkpointing"):
        encoder.activation_checkpointing_enable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),  # inductor for one of them: it compiles C++ for half a minute
    [
        ("biomedclip", "inductor"),
        ("vit", "aot_eager"),
        ("timm_convnext", "aot_eager"),
        ("modified_resnet", "aot_eager"),
    ],
)
def test_compiled_without_graph_breaks_gives_the_same_tokens(architecture, name, backend):
    encoder = BiomedClipEncoder.from_pretrained(architecture(name)).requires_grad_(False)
    pixels = random_pixels(encoder)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(pixels).patch_tokens, encoder(pixels).patch_tokens, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biomedclip", "vit", "timm_convnext"])
def test_exported_program_gives_the_same_tokens(architecture, name):
    encoder = BiomedClipEncoder.from_pretrained(architecture(name)).requires_grad_(False)
    pixels = random_pixels(encoder)
    exported = torch.export.export(encoder, (pixels,))
    tokens = exported.module()(pixels)["patch_tokens"]
    assert torch.allclose(tokens, encoder(pixels).patch_tokens, atol=1e-5)


# ---- files ----


def test_text_tower_is_neither_built_nor_asked_for(
    hub_cache, small_biomedclip, no_network, monkeypatch
):
    monkeypatch.setattr(open_clip.model, "HFTextEncoder", None)
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip)
    assert not [name for name, _ in encoder.named_parameters() if "text" in name]


def test_safetensors_and_pickles_give_the_same_tower(architecture, tmp_path):
    repo = architecture("biomedclip")
    shutil.copy(repo / "open_clip_config.json", tmp_path)
    state = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    a, b = BiomedClipEncoder.from_pretrained(repo), BiomedClipEncoder.from_pretrained(tmp_path)
    for (name, one), (_, two) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_importing_the_package_loads_neither_open_clip_nor_timm():
    code = (
        "import sys, moellava.encoders as e; "
        "print([m for m in ('open_clip', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_open_clip_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        BiomedClipEncoder(BiomedClipVisionConfig())


def test_unknown_timm_model_is_named():
    with pytest.raises(
        ValueError, match=r"open_clip cannot build the image tower.*vit_huge_from_nowhere"
    ):
        BiomedClipEncoder(
            BiomedClipVisionConfig(vision_cfg={"timm_model_name": "vit_huge_from_nowhere"})
        )
