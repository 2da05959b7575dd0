"""A small saved checkpoint and what it is loaded as."""

import openai
import pytest

from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.testing import TINYLLAMA
from tests.chat.serving import data_uri, running


@pytest.fixture(scope="session")
def checkpoint(hub_cache, small_biomedclip, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("chat") / "toy"
    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    loaded = load_pretrained_model(parts, dtype="float32")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def loaded(checkpoint) -> LoadedModel:
    return load_pretrained_model(checkpoint, dtype="float32")


@pytest.fixture(scope="session")
def scan(tmp_path_factory) -> str:
    """The path of a real image."""
    from PIL import Image
    from skimage import data

    path = tmp_path_factory.mktemp("scans") / "a scan.png"
    Image.fromarray(data.immunohistochemistry()[:200, :300]).save(path)
    return str(path)


@pytest.fixture(scope="module")
def address(loaded):
    with running(loaded) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def png(scan):
    with open(scan, "rb") as file:
        return data_uri(file.read())
