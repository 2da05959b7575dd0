"""The stages of training: what each starts from, which model it builds of that, and which weights it trains.

Public names: `STAGES`, `prepare_model`, `build_model`, `outline_model`, `find_start`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moellava.messages import unknown_name
from moellava.model.builder.assembly import configure
from moellava.model.builder.request import read_build_request
from moellava.model.builder.upcycle import upcycle_loaded, upcycled_config
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.configs import load_model_config
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model.configuration_llama_moe import is_mixture_config
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.train.checkpoints import checkpoints
from moellava.train.log.history import HISTORY_FILE, read_history
from moellava.train.recipe import Recipe
from moellava.train.trainable import set_trainable, with_adapters

MODEL_FOLDER = "model"  # in a run's folder, once the stage has finished
ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of `STAGES`."""

    after: str | None  # the stage that must have come before; None: the published parts
    trainable: tuple[str, ...]
    advice: str


STAGES = {
    "align": Stage(after=None, trainable=("projector",), advice="moellava train stage1_align"),
    "tune": Stage(
        after="align",
        trainable=("language_model", "projector"),
        advice="moellava train stage2_tune",
    ),
    "router": Stage(after="tune", trainable=(), advice="moellava train med_moe_router"),
    "experts": Stage(
        after="tune", trainable=("experts", "router"), advice="moellava train stage3_experts"
    ),
}


def prepare_model(recipe: Recipe, *, on_meta: bool = False) -> tuple[Any, LoadedModel]:
    """The model that a stage trains, with `requires_grad` set.

    Args:
        on_meta: without weights, on torch's meta device, to count and not to compute.

    Returns:
        The model to train, a PEFT model where the recipe has `lora`; and the `LoadedModel` inside.

    Raises:
        OSError: if there is nothing to start from.
        ValueError: if the start is not what the stage needs; the message says what is missing.
    """
    loaded = outline_model(recipe) if on_meta else build_model(recipe)
    parts = recipe.trainable or STAGES[recipe.stage].trainable
    set_trainable(loaded.model, parts)
    if recipe.lora is None:
        return loaded.model, loaded
    return with_adapters(loaded.model, parts, recipe.lora, seed=recipe.seed), loaded


def build_model(recipe: Recipe) -> LoadedModel:
    """As `prepare_model`, before anything is chosen to be trained."""
    start = find_start(recipe)
    if start is None:
        loaded = load_pretrained_model(
            recipe.model, moe_config=False, dtype=_dtype(recipe), seed=recipe.seed
        )
    else:
        loaded = load_pretrained_model(start, dtype=_dtype(recipe))
    if not _is_upcycled(recipe, loaded.model.config):
        return loaded
    moe = recipe.moe
    return upcycle_loaded(
        loaded,
        moe.config,
        seed=recipe.seed,
        noise=moe.noise,
        keep_function=moe.keep_function,
        router=None if moe.router is None else _router_file(moe.router),
    )


def outline_model(recipe: Recipe) -> LoadedModel:
    """As `build_model`, but on the meta device: of the weights, only those of a separate tower are read."""
    start = find_start(recipe)
    config: Any
    if start is None:
        config, processor = configure(
            read_build_request(recipe.model), moe_config=False, dtype=_dtype(recipe)
        )
    else:
        config = load_model_config(start)
        if not isinstance(
            config, MoeLlavaConfig
        ):  # a LLaVA, whose sizes are known once it has been read
            return build_model(recipe)
        processor = MoeLlavaProcessor.from_pretrained(start)
    if _is_upcycled(recipe, config):
        config = upcycled_config(config, recipe.moe.config)
    with torch.device("meta"):
        model: Any = MoeLlavaForConditionalGeneration(config)
    return LoadedModel(model.to(_dtype(recipe)), processor)


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.optim.precision == "bf16_weights" else torch.float32


def _is_upcycled(recipe: Recipe, config: Any) -> bool:
    """Whether the stage makes a mixture of the model that it starts from, or trains one further."""
    if recipe.stage != "experts":
        return False
    is_mixture = is_mixture_config(config.text_config)
    if is_mixture and recipe.moe.config:
        raise ValueError(
            f"{recipe.start_from} is a mixture of experts already, so moe.config cannot choose its experts. Start from "
            "the dense model of stage 'tune', or set moe.config={} to train this mixture further."
        )
    return not is_mixture


def find_start(recipe: Recipe) -> str | None:
    """The folder or id of the model to start from; None where the recipe names parts.

    Raises:
        OSError: if the folder is missing, or its run has not finished.
        ValueError: if it is not of the stage that has to come before.
    """
    after = recipe.after or STAGES[recipe.stage].after
    if recipe.start_from is None:
        if after not in (None, "any"):
            raise ValueError(
                f"Stage {recipe.stage!r} starts from a finished {after!r} stage: set start_from to its output_dir. "
                f"(That stage: {STAGES[after].advice if after in STAGES else after})"
            )
        if not recipe.model:
            raise ValueError(
                "The recipe names no model: set model.model_name_or_path and model.mm_vision_tower."
            )
        return None
    if recipe.model:
        raise ValueError(
            f"start_from is {recipe.start_from!r}, a model whose parts are fixed, but the recipe has model="
            f"{dict(recipe.model)} too. Leave out one of them (model={{}})."
        )
    if after is not None and after not in ("any", *STAGES):
        raise unknown_name("stage in after:", after, ["any", *STAGES])
    folder = Path(recipe.start_from).expanduser()
    if not folder.is_dir():
        if after in (None, "any"):
            return recipe.start_from  # an id of the hub
        raise FileNotFoundError(
            f"start_from is {recipe.start_from!r}, which is no folder. Stage {recipe.stage!r} starts from the "
            f"output_dir of a finished {after!r} stage; after=any takes any saved model or hub id."
        )
    model_folder = folder / MODEL_FOLDER if (folder / MODEL_FOLDER).is_dir() else folder
    if not (model_folder / "config.json").is_file():
        unfinished = ", ".join(path.name for path in checkpoints(folder))
        found = (
            f"only {unfinished}: that run has not finished; start it again, it goes on"
            if unfinished
            else "none"
        )
        raise FileNotFoundError(
            f"start_from is {recipe.start_from!r}, but there is no finished model in it ({found})."
        )
    _require_stage(recipe, after, model_folder)
    return str(model_folder)


def _require_stage(recipe: Recipe, after: str | None, model_folder: Path) -> None:
    if after in (None, "any"):
        return
    history = read_history(model_folder)
    last = history[-1]["stage"] if history else None
    if last == after:
        return
    made = (
        f"made by stage {last!r}"
        if last
        else f"no model of `moellava train` (it has no {HISTORY_FILE})"
    )
    raise ValueError(
        f"Stage {recipe.stage!r} starts from a model of stage {after!r}, but {recipe.start_from!r} is {made}. What is "
        f"missing: {STAGES[after].advice} start_from={recipe.start_from} output_dir=... "
        f"To start from it all the same: after={last or 'any'}."
    )


def _router_file(source: str) -> Path:
    path = Path(source).expanduser()
    for candidate in (path / MODEL_FOLDER / ROUTER_FILE, path / ROUTER_FILE):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(
            f"moe.router is {source!r}, a folder without {ROUTER_FILE}. Give the output_dir of a finished stage "
            f"'router' ({STAGES['router'].advice}), or a file with one router's weights."
        )
    return path  # a file; its reader says what is wrong with it
