"""A model as its difference from the published parts: projector, mixtures and all that was trained.

`save_trainable` compares the model with the base (image tower and language model as they are
published) and writes only what the base does not hold bit for bit; `load_trainable` reads the base,
checks that it is the same one, and puts the difference on top.

| name | what it does |
|---|---|
| `save_trainable` | writes the difference into a folder |
| `load_trainable` | opens such a folder |
| `is_trainable_folder` | whether a folder is one |
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import Unpack

from moellava.encoders import create_encoder, encoder_options
from moellava.encoders.factory import encoder_kinds
from moellava.messages import first_names, unknown_name
from moellava.model.checkpoint.adapter import name_base, read_adapter, require_known_kind
from moellava.model.checkpoint.configs import (
    GENERATION_FILE,
    model_type_of,
    open_processor,
    read_generation_config,
)
from moellava.model.checkpoint.llava import read_llava
from moellava.model.checkpoint.strict import model_from_tensors
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model import imported_state_dict, read_state_dict
from moellava.model.language_model.mixtures import LAYOUTS
from moellava.model.load_options import LoadOptions
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import (
    TOWER_PREFIX,
    MoeLlavaForConditionalGeneration,
    joined_name,
)
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.storage.errors import reading
from moellava.storage.sources import HubKeywords, HubOptions, Origin, read_json
from moellava.storage.weights import read_weights
from moellava.storage.writing import write_json

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "trainable.safetensors"
BASE_FILE = "base.json"
ADAPTER_FOLDER = "adapter"
STAGING_FOLDER = ".saving"  # a new save, until all of it is written
ADDED_ROWS = ".added_rows"  # rows of an embedding beyond the base's vocabulary, saved alone
# The two parts of a base, under the keys that users know, and what messages call them.
PARTS = {"model_name_or_path": "language model", "mm_vision_tower": "vision tower"}

# Where the parts of a base are on this machine: the keys are those of `PARTS`.
BasePlaces: TypeAlias = Mapping[str, str | os.PathLike[str]]


def save_trainable(
    model: PreTrainedModel | LoadedModel,
    folder: str | os.PathLike[str],
    *,
    processor: MoeLlavaProcessor | None = None,
    base: BasePlaces | None = None,
    **hub: Unpack[HubKeywords],
) -> list[str]:
    """Write what a model does not share with its base.

    These are the projector, mixtures, adapters, and all that was trained. The folder changes when
    everything has been written; if the process ends while files take their places, opening the
    folder is refused.

    Args:
        model: a `LoadedModel`, a `MoeLlavaForConditionalGeneration`, or a PEFT model around one; an
            adapter that is not merged goes into the folder `adapter`, in PEFT's own files.
        folder: created if missing; receives `config.json`, `base.json`, `trainable.safetensors` and
            the processor.
        processor: of the model, if `model` is not a `LoadedModel`.
        base: where the parts are on this machine, if this process did not build the model from them
            and they are not under the ids in its config: `{"model_name_or_path": ...,
            "mm_vision_tower": ...}`, one or both. Paths are used and not saved.
        **hub: `cache_dir`, `local_files_only`, as in transformers.

    Returns:
        The names of the saved weights.

    Raises:
        OSError: if the base cannot be read; it is needed, to tell what differs from it.
        ValueError: if the config does not say what the base is, or the weights are quantised.
    """
    whole: PreTrainedModel = model.model if isinstance(model, LoadedModel) else model
    if isinstance(model, LoadedModel):
        processor = processor or model.processor
    has_adapter = hasattr(whole, "peft_config")
    for adapter in getattr(whole, "peft_config", {}).values():
        require_known_kind(adapter.peft_type.value)
    own = _without_adapter(whole)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = _own_state_dict(own)
    places = {**(own.built_from or {}), **(base or {})}
    base_state = _read_base(own.config, places, HubOptions(**hub))
    difference = dict(_difference(state, base_state, own.dtype))
    shared = {
        name: tensor
        for name, tensor in base_state.items()
        if name in state and name not in difference
    }
    description = {
        PARTS[key]: {"name": origin.name, "revision": origin.revision, "sha256": checksum}
        for (key, origin), checksum in zip(
            _origins(own.config).items(), _checksums(shared), strict=True
        )
    }

    # Written beside, also since the model may be mapped to the very file that is replaced.
    with _replacing_files(folder) as staging:
        save_file(difference, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(staging / BASE_FILE, description)
        own.config.save_pretrained(staging)
        if own.generation_config is not None:
            own.generation_config.save_pretrained(staging)
        if processor is not None:
            processor.save_pretrained(staging)
        if has_adapter:
            whole.save_pretrained(str(staging / ADAPTER_FOLDER))
            name_base(staging / ADAPTER_FOLDER, own.config.language_model)
    logger.info(
        "%s: %d of %d tensors differ from the base, %d of %d bytes",
        folder,
        len(difference),
        len(state),
        sum(tensor.nbytes for tensor in difference.values()),
        sum(tensor.nbytes for tensor in state.values()),
    )
    return sorted(difference)


def load_trainable(
    folder: str | os.PathLike[str],
    *,
    base: BasePlaces | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
    **hub: Unpack[HubKeywords],
) -> LoadedModel:
    """Open what `save_trainable` wrote: the base from its published files, the difference on top.

    Args:
        folder: the folder, with the processor in it.
        base: where the parts are, if not under the ids that `base.json` names; as in
            `save_trainable`.
        dtype: of the weights but the routers; None takes the saved model's.
        attn_implementation, quantization_config: as in transformers.
        **hub: `cache_dir`, `local_files_only`, as in transformers.

    Raises:
        OSError: if the base or the folder cannot be read.
        ValueError: if the base is not the one that the weights were saved for, by checksum; both
            are named.
    """
    options = LoadOptions(
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )
    return open_trainable(Path(folder), base or {}, options, HubOptions(**hub))


def open_trainable(
    folder: Path, base: BasePlaces, options: LoadOptions, hub: HubOptions
) -> LoadedModel:
    """As `load_trainable`, with the options as they are passed on inside the package."""
    folder = folder.expanduser()
    _require_complete(folder)
    with reading(folder, "a config"):
        config = MoeLlavaConfig.from_pretrained(folder)
    dtype = options.dtype or _dtype_of(config)
    state = _add_base(folder, config, base, dtype, hub)
    generation_config = None
    if (folder / GENERATION_FILE).is_file():
        generation_config = read_generation_config(folder / GENERATION_FILE)
    loaded = model_from_tensors(
        state,
        config,
        open_processor(str(folder), hub),
        name=str(folder),
        dtype=dtype,
        options=options,
        generation_config=generation_config,
        built_from={key: str(path) for key, path in base.items()},
    )
    if (folder / ADAPTER_FOLDER).is_dir():
        adapted: Any = read_adapter(loaded.model, folder / ADAPTER_FOLDER)
        adapted.eval()
        loaded = replace(loaded, model=adapted)
    return loaded


def is_trainable_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `save_trainable` wrote this folder, or began to."""
    folder = Path(path).expanduser()
    return (folder / BASE_FILE).is_file() or (folder / STAGING_FOLDER).is_dir()


@contextmanager
def _replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files then take their places in `folder`.

    `base.json` goes first and comes last, so that new weights are never opened with an old config.
    """
    staging = folder / STAGING_FOLDER
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    (folder / BASE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == BASE_FILE):
        os.replace(path, folder / path.name)
    staging.rmdir()


def _require_complete(folder: Path) -> None:
    if not (folder / BASE_FILE).is_file():
        if (folder / STAGING_FOLDER).is_dir():
            raise OSError(
                f"{folder} is not complete: save_trainable was stopped while it replaced the files "
                "there. Save the model again."
            )
        raise OSError(
            f"{folder} has no {BASE_FILE}: save_trainable did not write it. Give a folder that it "
            "wrote."
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise OSError(
            f"{folder} is not complete: {WEIGHTS_FILE} is missing. Copy or save it again."
        )


def _dtype_of(config: MoeLlavaConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _add_base(
    folder: Path, config: MoeLlavaConfig, base: BasePlaces, dtype: torch.dtype, hub: HubOptions
) -> dict[str, Tensor]:
    """The saved difference, completed by the base's weights."""
    state = read_weights(folder / WEIGHTS_FILE)
    names = _weight_names(config)
    base_state = _read_base(config, base, hub)
    shared = {name: base_state[name] for name in base_state if name in names and name not in state}
    _require_same_base(folder, base, shared)
    for name, tensor in shared.items():
        rows = state.pop(name + ADDED_ROWS, None)
        tensor = tensor.to(dtype)
        state[name] = tensor if rows is None else torch.cat([tensor, rows.to(dtype)])
    return state


def _without_adapter(model: PreTrainedModel) -> MoeLlavaForConditionalGeneration:
    """The model of ours inside a PEFT model, or the model itself."""
    own: Any = model
    if hasattr(model, "peft_config"):
        if not hasattr(model, "get_base_model"):
            raise ValueError(
                "The model has an adapter inside, from add_adapter. Use "
                "peft.get_peft_model(model, config)."
            )
        own = own.get_base_model()
    if getattr(own, "hf_quantizer", None) is not None:
        raise ValueError(
            "The model's weights are quantised, so that hardly any equals the base's. Save it "
            "whole with save_pretrained, or train and save it without load_in_8bit and "
            "load_in_4bit."
        )
    found: MoeLlavaForConditionalGeneration = own
    return found


def _difference(
    state: dict[str, Tensor], base: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        reference = base.get(name)
        num_rows = 0 if reference is None or reference.dim() == 0 else len(reference)
        is_grown = reference is not None and tensor.dim() == 2 and len(tensor) > num_rows
        if reference is None or not torch.equal(
            tensor[:num_rows] if is_grown else tensor, reference.to(dtype)
        ):
            yield name, tensor.contiguous()
        elif is_grown:
            yield name + ADDED_ROWS, tensor[num_rows:].contiguous()


def _checksums(shared: dict[str, Tensor]) -> tuple[str, str]:
    """SHA-256 over names, dtypes, shapes and bytes: of the language model and of the tower."""
    hashes = hashlib.sha256(), hashlib.sha256()
    for name in sorted(shared):
        tensor, digest = shared[name].detach().contiguous(), hashes[name.startswith(TOWER_PREFIX)]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashes[0].hexdigest(), hashes[1].hexdigest()


def _require_same_base(folder: Path, base: BasePlaces, shared: dict[str, Tensor]) -> None:
    recorded = read_json(folder / BASE_FILE)
    for key, found in zip(PARTS, _checksums(shared), strict=True):
        part = PARTS[key]
        expected = recorded.get(part)
        if not isinstance(expected, dict) or not isinstance(expected.get("sha256"), str):
            raise ValueError(
                f"{folder / BASE_FILE} does not say which {part} the weights were saved for. Copy "
                "or save the folder again."
            )
        if found != expected["sha256"]:
            name, revision = str(expected.get("name")), expected.get("revision")
            raise ValueError(
                f"The weights in {folder} were saved for the {part} {Origin(name, revision)} "
                f"(sha256 {expected['sha256'][:12]}), but {str(base.get(key, name))!r} holds other "
                f"weights (sha256 {found[:12]}). Give the right one with "
                f"load_trainable(folder, base={{{key!r}: ...}})."
            )


def _origins(config: MoeLlavaConfig) -> dict[str, Origin]:
    vision = config.vision_config
    names = (config.language_model, config.language_model_revision), (vision.tower, vision.revision)
    for part, (name, _) in zip(PARTS.values(), names, strict=True):
        if name is None:
            raise ValueError(
                f"This model's config does not say which {part} it was built from, so there is no "
                "base to save the difference from. Use model.save_pretrained, or build with "
                "load_pretrained_model."
            )
    return {key: Origin(*name) for key, name in zip(PARTS, names, strict=True)}


def _read_base(config: MoeLlavaConfig, base: BasePlaces, hub: HubOptions) -> dict[str, Tensor]:
    """The published weights under our names, in their dtypes, mapped to their files if possible."""
    for key in base:
        if key not in PARTS:
            raise unknown_name("part of a base", key, PARTS)
    origins = _origins(config)
    places = {key: str(base.get(key, origin.name)) for key, origin in origins.items()}
    # Another place than the recorded one has no such revision.
    language_hub, tower_hub = (
        hub.at(origin.revision if places[key] == origin.name else None)
        for key, origin in origins.items()
    )
    language_model, tower = places.values()
    try:
        model_type = model_type_of(language_model, **language_hub.keywords)
        if model_type == "llava":
            parts = read_llava(language_model, moe_config=False, **language_hub.keywords)
            return parts.state_dict
        if model_type in LAYOUTS:
            state = imported_state_dict(language_model, **language_hub.keywords)[1]
        else:
            state = read_state_dict(language_model, **language_hub.keywords)
        vision = config.vision_config
        options = {name: getattr(vision, name) for name in encoder_options(type(vision))}
        encoder = create_encoder(_encoder_type(config), tower, **tower_hub.keywords, **options)
    except OSError as error:
        raise OSError(
            f"The base cannot be read: language model {origins['model_name_or_path']}, vision "
            f"tower {origins['mm_vision_tower']}. If they are local folders, say where: "
            f"base={{'model_name_or_path': ..., 'mm_vision_tower': ...}}. {error}"
        ) from error
    state = {joined_name(name): value for name, value in state.items()}
    return state | {f"{TOWER_PREFIX}{name}": value for name, value in encoder.state_dict().items()}


def _encoder_type(config: MoeLlavaConfig) -> str | None:
    model_type = config.vision_config.model_type
    return next((kind.name for kind in encoder_kinds() if model_type in kind.model_types), None)


def _weight_names(config: MoeLlavaConfig) -> set[str]:
    with torch.device("meta"):
        model = MoeLlavaForConditionalGeneration(config)
    return set(model.state_dict()) - set(model.all_tied_weights_keys)


def _own_state_dict(model: MoeLlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The model's weights under their own names: no adapter's wrappers, each tied weight once."""
    names = _weight_names(model.config)
    wrappers = (".base_layer.", ".original_module.")
    state = {}
    for name, tensor in model.state_dict().items():
        for wrapper in wrappers:
            name = name.replace(wrapper, ".")
        if name in names:
            state[name] = tensor
    missing = names - state.keys()
    if missing:
        raise ValueError(
            f"The model lacks weights that its config asks for: {first_names(sorted(missing))}. "
            "Merge or unload what was put around it."
        )
    return state
