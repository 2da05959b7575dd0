"""The stages of training: what each starts from, which model it builds of that, and which weights it trains.

Public names: `STAGES`, `PARTS`, `prepare_model`, `set_trainable`, `find_start`, `write_history`, `read_history`.
"""

import json
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moellava.messages import unknown_name
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.loaded_model import LoadedModel
from moellava.model.upcycle_loaded import upcycle_loaded
from moellava.train.recipe import Recipe

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"  # in a run's folder, once the stage has finished
HISTORY_FILE = "training.json"  # in a model's folder: the stages that made it
ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of `STAGES`."""

    after: str | None  # the stage that must have come before; None: the published parts
    trainable: tuple[str, ...]
    advice: str


STAGES = {
    "align": Stage(after=None, trainable=("projector",), advice="moellava train stage1_align"),
    "tune": Stage(after="align", trainable=("language_model", "projector"), advice="moellava train stage2_tune"),
    "router": Stage(after="tune", trainable=(), advice="moellava train med_moe_router"),
    "experts": Stage(after="tune", trainable=("experts", "router"), advice="moellava train stage3_experts"),
}

# What `trainable` may name, as patterns of parameter names.
PARTS = {
    "vision_tower": r"^model\.vision_tower\.",
    "projector": r"^model\.multi_modal_projector\.",
    "language_model": r"^(model\.language_model|lm_head)\.",
    "experts": r"\.mlp\.experts\.",
    "meta_expert": r"\.mlp\.meta_expert\.",
    "router": r"\.mlp\.gate\.",
}
# With adapters: the parts whose linear layers or experts get one, and the modules of others that are trained whole.
_ADAPTED_LINEARS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_ADAPTED_META_EXPERTS = r".*\.meta_expert\.(gate_proj|up_proj|down_proj)"
_EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_WHOLE = {"projector": "multi_modal_projector", "router": "gate", "vision_tower": "vision_tower"}


def prepare_model(recipe: Recipe) -> tuple[Any, LoadedModel]:
    """The model that a stage trains, with `requires_grad` set.

    Returns:
        The model to train, a PEFT model where the recipe has `lora`; and the `LoadedModel` inside.

    Raises:
        OSError: if there is nothing to start from.
        ValueError: if the start is not what the stage needs; the message says what is missing.
    """
    loaded = build_model(recipe)
    parts = recipe.trainable or STAGES[recipe.stage].trainable
    if recipe.lora is not None:
        return _with_adapters(loaded, parts, recipe), loaded
    set_trainable(loaded.model, parts)
    return loaded.model, loaded


def build_model(recipe: Recipe) -> LoadedModel:
    """As `prepare_model`, before anything is chosen to be trained."""
    dtype = torch.bfloat16 if recipe.optim.precision == "bf16_weights" else torch.float32
    start = find_start(recipe)
    if start is None:
        return load_pretrained_model(recipe.model, moe_config=False, dtype=dtype, seed=recipe.seed)
    loaded = load_pretrained_model(start, dtype=dtype)
    is_mixture = hasattr(loaded.model.config.text_config, "num_experts")
    if recipe.stage != "experts":
        return loaded
    if is_mixture and not recipe.moe.config:
        return loaded  # a mixture is trained further
    if is_mixture:
        raise ValueError(
            f"{start} is a mixture of experts already, so moe.config cannot choose its experts. Start from the dense "
            "model of stage 'tune', or set moe.config={} to train this mixture further."
        )
    moe = recipe.moe
    return upcycle_loaded(
        loaded,
        moe.config,
        seed=recipe.seed,
        noise=moe.noise,
        keep_function=moe.keep_function,
        router=None if moe.router is None else _router_file(moe.router),
    )


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
            raise ValueError("The recipe names no model: set model.model_name_or_path and model.mm_vision_tower.")
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
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        found = (
            f"only {', '.join(checkpoints)}: that run has not finished; start it again, it goes on"
            if checkpoints
            else "none"
        )
        raise FileNotFoundError(f"start_from is {recipe.start_from!r}, but there is no finished model in it ({found}).")
    _require_stage(recipe, after, model_folder)
    return str(model_folder)


def _require_stage(recipe: Recipe, after: str | None, model_folder: Path) -> None:
    if after in (None, "any"):
        return
    history = read_history(model_folder)
    last = history[-1]["stage"] if history else None
    if last == after:
        return
    made = f"made by stage {last!r}" if last else f"no model of `moellava train` (it has no {HISTORY_FILE})"
    raise ValueError(
        f"Stage {recipe.stage!r} starts from a model of stage {after!r}, but {recipe.start_from!r} is {made}. What is "
        f"missing: {STAGES[after].advice} start_from={recipe.start_from} output_dir=... "
        f"To start from it all the same: after={last or 'any'}."
    )


def set_trainable(model: nn.Module, parts: Collection[str]) -> int:
    """Let the named parts learn and freeze all else.

    Returns:
        How many parameters learn.

    Raises:
        ValueError: for a part that is unknown, that the model does not have, or that its config freezes.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part in trainable:", part, PARTS)
    model.requires_grad_(False)
    found = dict.fromkeys(parts, 0)
    frozen_router = getattr(model.config.text_config, "router_frozen", False)  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        for part in parts:
            if re.search(PARTS[part], name):
                if part == "router" and frozen_router:
                    raise ValueError(
                        "trainable names 'router', but moe.config.router_frozen is true. Drop one of them."
                    )
                found[part] += parameter.numel()
                parameter.requires_grad_(not (frozen_router and re.search(PARTS["router"], name)))
    for part, count in found.items():
        if count == 0:
            raise ValueError(
                f"trainable names {part!r}, but the model has no such weights. It has: "
                f"{', '.join(name for name, pattern in PARTS.items() if _has(model, pattern))}."
            )
    if "vision_tower" in parts:
        _freeze_unused_blocks(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _has(model: nn.Module, pattern: str) -> bool:
    return any(re.search(pattern, name) for name, _ in model.named_parameters())


def _freeze_unused_blocks(model: Any) -> None:
    """Blocks behind the selected layer do not run, and DDP waits for every weight that could learn."""
    tower = model.model.vision_tower
    height, width = model.config.vision_config.image_hw
    pixels = torch.zeros(1, 3, height, width, dtype=tower.dtype, device=tower.device)
    tower(pixels).patch_tokens.float().sum().backward()
    for parameter in tower.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    tower.zero_grad(set_to_none=True)


def _with_adapters(loaded: LoadedModel, parts: Sequence[str], recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    assert lora is not None
    set_trainable(loaded.model, parts)  # checks the names; PEFT decides what learns
    linears = (
        _ADAPTED_LINEARS if "language_model" in parts else _ADAPTED_META_EXPERTS if "meta_expert" in parts else None
    )
    is_mixture = hasattr(loaded.model.config.text_config, "num_experts")
    experts = _EXPERT_WEIGHTS if is_mixture and {"language_model", "experts"} & set(parts) else None
    if linears is None and experts is None:
        raise ValueError(f"lora adapts the language model or its experts, but trainable is {list(parts)}.")
    if experts and lora.dropout:
        raise ValueError(
            f"lora.dropout is {lora.dropout}, but PEFT has no dropout for fused experts. Set lora.dropout=0."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=linears,
        target_parameters=experts,
        modules_to_save=[_WHOLE[part] for part in parts if part in _WHOLE] or None,
    )
    return get_peft_model(loaded.model, config)


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


def read_history(model_folder: Path) -> list[dict[str, Any]]:
    """The stages that made a model, first to last; empty where `moellava train` did not."""
    file = model_folder / HISTORY_FILE
    history: list[dict[str, Any]] = json.loads(file.read_text())["stages"] if file.is_file() else []
    return history


def write_history(model_folder: Path, history: list[dict[str, Any]]) -> None:
    """Record the stages beside the weights: names and numbers, no path of this machine."""
    (model_folder / HISTORY_FILE).write_text(json.dumps({"stages": history}, indent=1) + "\n")
