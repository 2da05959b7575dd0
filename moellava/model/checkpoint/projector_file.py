"""A trained projector on disk and the tower that it was trained for.

A projector reads the patch tokens of one tower: `TrainedProjector.require_fit` refuses another.

| name | what it does |
|---|---|
| `save_projector` | writes the projector of a joined model |
| `read_projector` | reads one, also of a saved model or of LLaVA's code |
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moellava.model.checkpoint.llava import read_mm_projector
from moellava.model.checkpoint.tower_identity import TowerIdentity, tower_identity
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.modeling_moellava import PROJECTOR_PREFIX, TOWER_PREFIX
from moellava.model.projector import ProjectorShape, build_projector
from moellava.storage.errors import reading
from moellava.storage.sources import read_json
from moellava.storage.weights import read_weights, require_fit
from moellava.storage.writing import replacing

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "projector.safetensors"
HEADER = "moellava_projector"  # the key of our description in the file's own header


@dataclass(frozen=True, kw_only=True)
class TrainedProjector:
    """The weights of a projector with all that is known of it; `tower` is None if unknown."""

    path: str
    projector_type: str
    options: Mapping[str, Any] | None
    vision_width: int
    text_width: int
    tower: TowerIdentity | None
    state_dict: dict[str, Tensor]

    def require_fit(self, shape: ProjectorShape, tower: TowerIdentity) -> None:
        """Raise `ValueError` unless the projector fits these widths and belongs to this tower."""
        if (self.vision_width, self.text_width) != (shape.vision_width, shape.text_width):
            raise ValueError(
                f"The projector {self.path} goes from width {self.vision_width} to "
                f"{self.text_width}, but the tower {tower} gives patch tokens of width "
                f"{shape.vision_width} and the language model takes {shape.text_width}. Take the "
                "parts that it was trained between, or train a new projector."
            )
        if self.tower is None:
            logger.warning(
                "projector %s names no tower that it was trained for; only its shapes are checked",
                self.path,
            )
        elif differing := self.tower.differs_from(tower):
            raise ValueError(
                f"The projector {self.path} was trained for the tower {self.tower}, but this model "
                f"has {tower}: they differ in {', '.join(differing)}. Use that tower and setting, "
                "or train a new projector. To start with its weights all the same, put "
                "read_projector(path).state_dict into the built model yourself."
            )
        with torch.device("meta"):
            expected = build_projector(self.projector_type, shape, self.options).state_dict()
        mismatched = [
            f"{name}: {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in self.state_dict.items()
            if name in expected and tensor.shape != expected[name].shape
        ]
        require_fit(
            f"the projector {self.path}, a {self.projector_type} with {dict(self.options or {})},",
            missing=expected.keys() - self.state_dict.keys(),
            unexpected=self.state_dict.keys() - expected.keys(),
            mismatched=mismatched,
        )


def save_projector(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Path:
    """Write a joined model's projector, and which tower it belongs to.

    Args:
        model: a `MoeLlavaForConditionalGeneration`.
        folder: created if missing; receives `projector.safetensors`.

    Returns:
        The file, which `load_pretrained_model(..., projector_config={"path": ...})` reads.
    """
    joined: Any = model
    config = joined.config
    shape = config.projector_shape
    description = {
        "projector_type": config.projector_type,
        "options": config.projector_options,
        "vision_width": shape.vision_width,
        "text_width": shape.text_width,
        "tower": asdict(
            tower_identity(config.vision_config, joined.model.vision_tower.state_dict())
        ),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = joined.model.multi_modal_projector.state_dict()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", HEADER: json.dumps(description)}
    with replacing(folder / PROJECTOR_FILE) as part:
        save_file(state, part, metadata=metadata)
    return folder / PROJECTOR_FILE


def read_projector(path: str | os.PathLike[str]) -> TrainedProjector:
    """Read a trained projector and what its source says about it.

    Args:
        path: the folder or file of `save_projector`; the folder of a saved model, whole or by
            `save_trainable`; or a projector of the original LLaVA's code, as
            `moellava.model.checkpoint.llava.read_mm_projector` takes it.

    Raises:
        OSError: if there is no such file.
        ValueError: if it holds no projector.
    """
    place = Path(path).expanduser()
    own = place / PROJECTOR_FILE if place.is_dir() else place
    if own.is_file() and own.suffix == ".safetensors":
        with reading(own, "a projector"), safe_open(own, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is not None:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                description = json.loads(header)
                tower = TowerIdentity(**description.pop("tower"))
                return TrainedProjector(
                    path=str(path), tower=tower, state_dict=state, **description
                )
    config_file = (place if place.is_dir() else place.parent) / "config.json"
    settings = read_json(config_file) if config_file.is_file() else {}
    if place.is_dir() and settings.get("model_type") == MoeLlavaConfig.model_type:
        return _from_saved_model(place)
    return _from_llava(place, settings)


def _from_saved_model(folder: Path) -> TrainedProjector:
    with reading(folder, "a config"):
        config: Any = MoeLlavaConfig.from_pretrained(folder)
    state = _saved_tensors(folder, (PROJECTOR_PREFIX, TOWER_PREFIX))
    projector = _without_prefix(state, PROJECTOR_PREFIX)
    if not projector and config.projector_type != "identity":
        raise ValueError(f"{folder} holds no weights of a projector. Is the checkpoint complete?")
    tower = _without_prefix(state, TOWER_PREFIX)
    identity = tower_identity(config.vision_config, tower)
    if (folder / "base.json").is_file():  # by save_trainable: only what was trained of the tower
        if tower:
            raise ValueError(
                f"The projector in {folder} was trained together with its tower, which is then not "
                "a published one. Open the model, load_pretrained_model("
                f"{str(folder)!r}), and use save_projector."
            )
        identity = TowerIdentity(**config.projector_tower) if config.projector_tower else identity
    shape = config.projector_shape
    return TrainedProjector(
        path=str(folder),
        projector_type=config.projector_type,
        options=config.projector_options,
        vision_width=shape.vision_width,
        text_width=shape.text_width,
        tower=identity,
        state_dict=projector,
    )


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _saved_tensors(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with one of `prefixes`, mapped."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_weights(path, prefixes)
    return tensors


def _from_llava(place: Path, settings: Mapping[str, Any]) -> TrainedProjector:
    state = read_mm_projector(place)
    matrices = [value for value in state.values() if value.dim() == 2]
    layers = {name.rpartition(".")[0] for name in state}
    num_layers = len(layers)
    if layers == {""}:
        projector_type = "linear"
    elif layers == {str(2 * index) for index in range(num_layers)}:
        projector_type = f"mlp{num_layers}x_gelu"
    else:
        raise ValueError(
            f"{place} holds layers {', '.join(sorted(layers))}, which are not a projector of "
            "LLaVA's code. Write it with moellava.model.checkpoint.projector_file.save_projector."
        )
    name = settings.get("mm_vision_tower") or settings.get("mm_image_tower")  # MoE-LLaVA's
    layer = settings.get("mm_vision_select_layer")
    tower = TowerIdentity(tower=name, select_layer=layer) if name else None
    return TrainedProjector(
        path=str(place),
        projector_type=projector_type,
        options=None,
        vision_width=matrices[0].shape[1],
        text_width=matrices[-1].shape[0],
        tower=tower,
        state_dict=state,
    )
