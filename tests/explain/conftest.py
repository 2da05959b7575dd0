"""Small joined models in float32: random weights, real files, 10 x 10 patches."""

import numpy as np
import pytest
from PIL import Image

from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.testing import TINYLLAMA, write_biomedclip


@pytest.fixture(scope="session")
def small_tower(tmp_path_factory) -> str:
    """A BiomedCLIP folder of 160 pixels: 10 x 10 patches of width 64."""
    folder = tmp_path_factory.mktemp("towers") / "biomedclip_test"
    return str(write_biomedclip(folder, vision="test_vit", image_size=160))


@pytest.fixture(scope="session")
def build(hub_cache, small_tower):
    """A function that joins the tower and TinyLlama's stand-in, with other settings if given."""

    def build_model(moe_config=True, **settings) -> LoadedModel:
        parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": small_tower, **settings}
        return load_pretrained_model(parts, dtype="float32", seed=0, moe_config=moe_config)

    return build_model


@pytest.fixture(scope="session")
def loaded(build) -> LoadedModel:
    return build()


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A wide picture with structure everywhere."""
    values = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((300, 180), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def explanation(loaded, picture):
    """One explanation with every map, of an answer of four tokens."""
    from moellava.explain import explain

    return explain(
        loaded,
        picture,
        "What organ is shown?",
        answer="the left lung",
        gradient=True,
        ablation=True,
        blocks=(2, 3),
    )
