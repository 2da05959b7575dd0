"""Every projector against what it promises, those of installed packages included."""

import re
from pathlib import Path

import pytest
import torch

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.projector import (
    PROJECTORS,
    AveragePool,
    PixelShuffle,
    ProjectorShape,
    build_projector,
    num_projected_tokens,
    register_projector,
)
from moellava.plugins import load_plugins
from tests.model.projectors import SMALL, shape

ALL = [*PROJECTORS, "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"]


@pytest.mark.parametrize("projector_type", ALL)
def test_every_projector_gives_the_count_and_width_that_it_promises(projector_type):
    between = shape(vision_width=20) if projector_type == "identity" else shape()
    options = SMALL.get(projector_type)
    projector = build_projector(projector_type, between, options)
    tokens = torch.randn(2, 24, between.vision_width, requires_grad=True)
    embeds = projector(tokens)
    assert embeds.shape == (2, num_projected_tokens(projector_type, between, options), 20)
    embeds.square().sum().backward()
    assert tokens.grad.abs().sum(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("projector_type", [name for name in ALL if name != "identity"])
def test_every_projector_goes_through_the_builder_a_save_and_generate(
    projector_type, parts, images, tmp_path
):
    description = parts | {
        "projector_type": projector_type,
        "projector_options": SMALL.get(projector_type),
    }
    loaded = load_pretrained_model(description, dtype="float32")
    num_tokens = loaded.processor.num_image_tokens
    assert num_tokens == {
        "pixel_shuffle": 49,
        "average_pool": 49,
        "perceiver": 5,
        "qformer": 6,
    }.get(projector_type, 196)
    inputs = loaded.processor(text="<image> Why?", images=images[0], return_tensors="pt")
    assert (inputs["input_ids"] == 32000).sum() == num_tokens
    answer = loaded.answer(images[:2], ["What is this?", "Why?"], max_new_tokens=3)
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    reloaded = load_pretrained_model(tmp_path)
    assert reloaded.answer(images[:2], ["What is this?", "Why?"], max_new_tokens=3) == answer
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in reloaded.model.state_dict().items())


def test_mlp2x_gelu_is_transformers_llava_projector():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=12),
        text_config=LlamaConfig(hidden_size=20, num_attention_heads=2),
    )
    theirs = LlavaMultiModalProjector(config)
    ours = build_projector("mlp2x_gelu", shape())
    names = {"linear_1": "0", "linear_2": "2"}
    ours.load_state_dict(
        {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()}
    )
    tokens = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_is_idefics3s(factor):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    tokens = torch.randn(2, 64, 3)
    theirs = Idefics3Connector.pixel_shuffle(None, tokens, factor)
    assert torch.equal(PixelShuffle((8, 8), factor)(tokens), theirs)


def test_average_pool_is_the_mean_of_neighbours():
    tokens = torch.randn(1, 24, 3)
    pooled = AveragePool((4, 6), 2)(tokens)
    neighbours = [
        6 * row + column for row in (2, 3) for column in (4, 5)
    ]  # the last block of the 2x3 blocks
    torch.testing.assert_close(pooled[0, -1], tokens[0, neighbours].mean(0))


@pytest.fixture
def registry():
    """The registered types; those that a test adds are removed after it."""
    before = dict(PROJECTORS)
    yield PROJECTORS
    PROJECTORS.clear()
    PROJECTORS.update(before)
    load_plugins.cache_clear()


@pytest.mark.usefixtures("registry")
def test_a_registered_projector_works_in_the_builder(parts, images):
    class EveryNth(torch.nn.Linear):
        def __init__(self, built_for: ProjectorShape, stride: int) -> None:
            super().__init__(built_for.vision_width, built_for.text_width)
            self.stride = stride

        def forward(self, patch_tokens):
            return super().forward(patch_tokens[:, :: self.stride])

    register_projector(
        "every_nth",
        EveryNth,
        num_tokens=lambda built_for, stride: -(-built_for.num_patches // stride),
        options={"stride": 3},
    )
    loaded = load_pretrained_model(
        parts | {"projector_type": "every_nth", "projector_options": {"stride": 10}}
    )
    assert loaded.processor.num_image_tokens == 20
    assert loaded.answer(images[0], "Why?", max_new_tokens=2)
    with pytest.raises(ValueError, match="'every_nth' is taken"):
        register_projector("every_nth", EveryNth)


@pytest.mark.usefixtures("registry")
def test_a_projector_without_a_count_keeps_every_patch():
    def build(built_for: ProjectorShape) -> torch.nn.Module:
        return torch.nn.Linear(built_for.vision_width, built_for.text_width)

    register_projector("plain", build)
    assert num_projected_tokens("plain", shape()) == 24


def test_the_guides_package_adds_a_projector_that_opens_where_it_is_installed(
    registry, hub_cache, no_network, images, tmp_path, monkeypatch
):
    guide = (Path(__file__).parents[2] / "docs" / "add_a_projector.md").read_text()
    package, example = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (entry_points,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    site = tmp_path / "site-packages"
    metadata = site / "row_pool-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "row_pool.py").write_text(package)
    (metadata / "METADATA").write_text("Name: row_pool\nVersion: 1.0\n")
    points = entry_points.replace('[project.entry-points."', "[").replace('"]', "]")
    (metadata / "entry_points.txt").write_text(points.replace('"', ""))
    load_plugins.cache_clear()
    with monkeypatch.context() as installed:
        installed.syspath_prepend(site)
        variables: dict[str, object] = {}
        exec(example, variables)
        loaded = variables["loaded"]
        assert str(loaded.processor.num_image_tokens) in guide.split("```")[-1].splitlines()[2]
        answer = loaded.answer(images[0], "Why?", max_new_tokens=2)
        loaded.model.save_pretrained(tmp_path / "saved")
        loaded.processor.save_pretrained(tmp_path / "saved")

    # A new process is one that has registered nothing and looks for entry points again.
    del registry["row_pool"]
    load_plugins.cache_clear()
    with pytest.raises(ValueError, match="Unknown projector_type 'row_pool'"):
        load_pretrained_model(tmp_path / "saved")
    load_plugins.cache_clear()
    monkeypatch.syspath_prepend(site)
    reopened = load_pretrained_model(tmp_path / "saved")
    assert reopened.answer(images[0], "Why?", max_new_tokens=2) == answer


class TestBadInput:
    def test_identity_needs_equal_widths(self):
        with pytest.raises(ValueError, match="12 channels and the language model's embeddings 20"):
            build_projector("identity", shape())

    def test_an_unknown_type_suggests_the_nearest(self):
        with pytest.raises(ValueError, match=r"projector_type 'linaer'\. Did you mean 'linear'\?"):
            build_projector("linaer", shape())
        with pytest.raises(ValueError, match="'mlp0x_gelu'"):
            num_projected_tokens("mlp0x_gelu", shape())

    def test_an_unknown_option_suggests_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"projector 'perceiver': 'num_latent'\. Did you mean 'num_latents'\?"
        ):
            build_projector("perceiver", shape(), {"num_latent": 3})

    @pytest.mark.parametrize("projector_type", ["pixel_shuffle", "average_pool"])
    def test_a_factor_must_divide_the_grid(self, projector_type):
        with pytest.raises(ValueError, match="factor is 4, which does not divide the 4x6 grid"):
            build_projector(projector_type, shape(), {"factor": 4})

    def test_merging_neighbours_needs_patches_only(self):
        with pytest.raises(
            ValueError, match="4x6 grid, but the tower gives 25 tokens, the class token among them"
        ):
            num_projected_tokens("pixel_shuffle", shape(num_patches=25))

    @pytest.mark.parametrize(
        ("projector_type", "options", "message"),
        [
            ("perceiver", {"num_latents": 10**9}, r"num_latents in projector 'perceiver' asks for"),
            ("qformer", {"num_layers": 10**7}, r"num_layers in projector 'qformer' asks for"),
            ("mlp10000000x_gelu", {}, r"projector_type 'mlp10000000x_gelu' asks for 10,000,000"),
            ("mlp" + "9" * 5000 + "x_gelu", {}, "asks for 999,999,999"),
            ("perceiver", {"num_latents": 0}, "num_latents of the projector is 0"),
            ("qformer", {"hidden_size": -64}, "hidden_size of the Q-Former is -64"),
            (
                "perceiver",
                {"num_latents": "64"},
                r"num_latents .* is '64'; expected int, such as 64",
            ),
            ("pixel_shuffle", {"factor": None}, "factor .* is None; expected int"),
        ],
    )
    def test_options_that_nothing_can_be_built_of_are_refused(
        self, projector_type, options, message
    ):
        with pytest.raises(ValueError, match=message):
            build_projector(projector_type, shape(), options)
