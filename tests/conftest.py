"""Stand-ins under the real repo ids, shared by all tests. Nothing here, or in a test, reaches a
hub.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# huggingface_hub reads its environment once, when it is first imported; xdist's workers inherit it
# from here.
_IS_OWNER = "MOELLAVA_TEST_HUB" not in os.environ
HUB = Path(os.environ.setdefault("MOELLAVA_TEST_HUB", tempfile.mkdtemp(prefix="moellava-hub-")))
os.environ["HF_HUB_CACHE"] = str(HUB)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = str(HUB / "datasets-cache")

import pytest  # noqa: E402

from moellava.testing import (  # noqa: E402
    DATASETS,
    STAND_INS,
    blocked_network,
    fill_dataset_cache,
    fill_hub_cache,
    write_biomedclip,
)


def _once(name: str, write: Callable[[], object]) -> None:
    """Call `write` in one worker; the others wait until it is done."""
    from filelock import FileLock

    done = HUB / f".{name}.done"
    with FileLock(HUB / f".{name}.lock"):
        if not done.exists():
            write()
            done.touch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the slowest tests first, so that no worker is left alone with one at the end."""
    seconds: dict[Path, int] = {}
    for item in items:
        if marker := item.get_closest_marker("slow"):
            longest = max(seconds.get(item.path, 0), marker.kwargs.get("seconds", 10))
            seconds[item.path] = longest
    items.sort(key=lambda item: -seconds.get(item.path, 0))


def pytest_unconfigure() -> None:
    if _IS_OWNER:
        shutil.rmtree(HUB, ignore_errors=True)


@pytest.fixture(scope="session")
def hub_cache() -> dict[str, Path]:
    """A Hugging Face cache with every stand-in; the snapshot folder of each repo id."""
    from moellava.testing import REVISION

    _once("stand-ins", lambda: fill_hub_cache(HUB))
    return {
        id: HUB / f"models--{id.replace('/', '--')}" / "snapshots" / REVISION for id in STAND_INS
    }


@pytest.fixture(scope="session")
def dataset_cache() -> dict[str, Path]:
    """The same for datasets."""
    from moellava.testing import REVISION

    _once("datasets", lambda: fill_dataset_cache(HUB))
    return {
        id: HUB / f"datasets--{id.replace('/', '--')}" / "snapshots" / REVISION for id in DATASETS
    }


@pytest.fixture(scope="session")
def small_biomedclip() -> Path:
    """A BiomedCLIP repo as a local folder: real keys and 196 patches, width 192 instead of 768."""
    folder = HUB / "local" / "biomedclip_small"
    _once("small-biomedclip", lambda: write_biomedclip(folder, vision="vit_tiny_patch16_224"))
    return folder


@pytest.fixture(scope="session")
def made_once() -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, write)`: the folder that `write(folder)` fills, once for all workers.

    What takes long and is only read afterwards: a session's fixture is made by each worker.
    """

    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder = HUB / "made" / name

        def fill() -> None:
            shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt has left
            folder.mkdir(parents=True)
            write(folder)

        _once(name, fill)
        return folder

    return make


@pytest.fixture
def no_network() -> Iterator[None]:
    """Any socket connection or host look-up during the test is an error."""
    with blocked_network():
        yield
