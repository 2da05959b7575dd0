"""A small joined model in float32, built once; tests that change a model build their own."""

import numpy as np
import pytest
from PIL import Image

from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.testing import TINYLLAMA, write_tinyllama


@pytest.fixture(scope="session")
def parts(hub_cache, small_biomedclip) -> dict[str, str]:
    """A small model's description: TinyLlama's stand-in and a BiomedCLIP folder of width 192."""
    return {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}


@pytest.fixture(scope="session")
def groupable_parts(small_biomedclip, tmp_path_factory) -> dict[str, str]:
    """The same with widths that groups of 4-bit weights divide."""
    folder = write_tinyllama(
        tmp_path_factory.mktemp("tinyllama"), hidden_size=64, intermediate_size=128
    )
    return {"model_name_or_path": str(folder), "mm_vision_tower": str(small_biomedclip)}


@pytest.fixture(scope="session")
def loaded(parts) -> LoadedModel:
    return load_pretrained_model(parts, dtype="float32")


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Three real images of different shapes and modes: histology, retina (RGB), a cell (grey)."""
    skimage_data = pytest.importorskip("skimage.data")
    return [
        Image.fromarray(skimage_data.immunohistochemistry()),
        Image.fromarray(skimage_data.retina()[300:900, 200:1000]),
        Image.fromarray(np.ascontiguousarray(skimage_data.cell())),
    ]
