"""The file of a fitted router, and the mixture that it is for: `router_for`, `find_router`."""

import json
from pathlib import Path

from safetensors import safe_open

from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.storage.errors import reading
from moellava.train.options import Recipe
from moellava.train.run_folder import MODEL_FOLDER
from moellava.train.stage import STAGES

ROUTER_FILE = "router.safetensors"  # in the model folder of a `router` stage
LAYERS_KEY, LABELS_KEY = "layers", "labels"  # in its metadata, as JSON


def router_for(recipe: Recipe, config: MoeLlavaConfig) -> Path | None:
    """The file of the router that the mixture `config` starts with; None if it learns its own.

    The labels of the experts become `config.expert_labels`, which is saved with the model.

    Raises:
        OSError: if there is no such file.
        ValueError: if routers are frozen but none is given, or it was fitted to other layers.
    """
    source, text = recipe.moe.router, config.text_config
    if source is None:
        if text.router_frozen:
            raise ValueError(
                "moe.config.router_frozen is true, but moe.router is not set: the routers would "
                "stay random. Set moe.router to the output_dir of a finished stage 'router' "
                f"(moellava train {STAGES['router'].recipe}), or moe.config.router_frozen=false."
            )
        return None
    file = find_router(source)
    notes = _notes_of(file)
    layers, wanted = notes.get(LAYERS_KEY), list(text.moe_layer_indices)
    if layers is not None and layers != wanted:
        raise ValueError(
            f"{file} was fitted to the layers {layers}, but moe.config.moe_layers makes the layers "
            f"{wanted} sparse. Use the same moe_layers, or fit another router."
        )
    if LABELS_KEY in notes:
        config.expert_labels = notes[LABELS_KEY]
    return file


def find_router(source: str) -> Path:
    """The file in a run's folder or in a model's folder, or the file itself."""
    path = Path(source).expanduser()
    for candidate in (path / MODEL_FOLDER / ROUTER_FILE, path / ROUTER_FILE):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(
            f"moe.router is {source!r}, a folder without {ROUTER_FILE}. Give the output_dir of a "
            f"finished stage 'router' (moellava train {STAGES['router'].recipe}), or a file with "
            "one router's weights."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no router file {source!r}.")
    return path


def _notes_of(file: Path) -> dict[str, list[object]]:
    """What stage `router` wrote into the file; nothing for files of another origin."""
    if file.suffix != ".safetensors":
        return {}
    with reading(file, "a router"), safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata() or {}
        return {
            key: json.loads(metadata[key]) for key in (LAYERS_KEY, LABELS_KEY) if key in metadata
        }
