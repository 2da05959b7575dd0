"""The file of a fitted router, and the mixture that it is for: `router_for`, `find_router`."""

from pathlib import Path

from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model.router_weights import router_facts
from moellava.train.options import Recipe
from moellava.train.run_folder import MODEL_FOLDER
from moellava.train.stage import STAGES

ROUTER_FILE = "router.safetensors"  # in the model folder of a `router` stage


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
    layers, labels = router_facts(file)
    wanted = list(text.moe_layer_indices)
    if layers is not None and layers != wanted:
        raise ValueError(
            f"{file} was fitted to the layers {layers}, but moe.config.moe_layers makes the layers "
            f"{wanted} sparse. Use the same moe_layers, or fit another router."
        )
    if labels is not None:
        config.expert_labels = labels
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
