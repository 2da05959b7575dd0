"""A recipe: one stage of training as typed, frozen settings, from a YAML file and `key=value` words.

Public names: `Recipe` and its parts `DataOptions`, `Optim`, `Lora`, `Moe`, `Logging`, `Saving`, `Evaluation`;
`load_recipe`, `recipe_names`, `recipe_to_dict`.
"""

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from moellava.messages import unknown_name
from moellava.model.language_model import LlamaMoeConfig
from moellava.model.language_model.upcycling import MOE_OPTIONS

FOLDER = Path(__file__).with_name("recipes")
Stage = Literal["align", "tune", "router", "experts"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained and tested on; paths and formats as `moellava.data.read_rows` takes them."""

    train: str | None = None  # required; a file, a folder or a hub id
    train_split: str | None = None
    evaluation: str | None = None  # held-out rows; None trains without evaluation
    evaluation_split: str | None = None
    images: str | None = None  # the folder that image paths are relative to
    format: str = "auto"
    skip_bad: bool = False  # leave malformed rows out, counted and listed, instead of stopping
    chat_template: str | None = None  # `plain`, `tinyllama`, ...; None is the model's own
    max_length: int | None = 2048  # tokens of a row, image placeholders included
    long_rows: Literal["error", "truncate"] = "error"
    packing: bool = (
        False  # rows of a device's batch in one sequence instead of padded; none attends to another
    )
    group_by_length: bool = True
    num_workers: int = 4  # processes that open images and tokenize
    # A file that keeps what the frozen tower makes of each image, so that it runs once. Images in files are known by
    # their paths: delete it where they have changed.
    features: str | None = None


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Batches, schedule, optimizer and precision."""

    learning_rate: float = 2e-5
    batch_size: int = (
        128  # rows per optimizer step, over all devices; what does not fit at once is accumulated
    )
    per_device_batch_size: int = 8
    epochs: float = 1.0
    max_steps: int | None = None  # optimizer steps, in place of `epochs`
    schedule: str = "cosine"  # any of transformers' schedulers
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"  # any of transformers' optimizers
    # bf16: bfloat16 arithmetic on float32 weights; bf16_weights: bfloat16 weights too (half the memory, and small
    # updates are lost to rounding); fp32.
    precision: Literal["bf16", "bf16_weights", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters by PEFT, in place of the weights that `trainable` would train in the language model."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Moe:
    """How a dense model becomes a mixture: fields of `LlamaMoeConfig`, and of `upcycled_state_dict`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    keep_function: bool = True
    router: str | None = None  # run folder of a `router` stage, or a file with one router's weights


@dataclass(frozen=True, kw_only=True)
class Logging:
    every: int = 1  # optimizer steps
    report_to: tuple[str, ...] = (
        "tensorboard",
    )  # also wandb, mlflow, ...: transformers' own names


@dataclass(frozen=True, kw_only=True)
class Saving:
    every: int = 500  # optimizer steps between checkpoints
    keep: int = 2  # newest checkpoints that stay


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    every: int = 500  # optimizer steps
    num_rows: int | None = None  # first held-out rows whose loss is taken; None is all
    num_answers: int = 8  # held-out questions that are answered into the log
    max_new_tokens: int = 32


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One stage of training.

    `start_from` is the folder of the stage before, or any saved model; without it, `model` names the parts, with the
    keys of `load_pretrained_model`. `after` is the stage that the start has to come from (`any` takes every model);
    left out, it is the stage's usual one. `trainable` are names of `moellava.train.stages.PARTS`; left out, the
    stage's usual ones. `trainer` goes to transformers' `TrainingArguments` as it is. Stage `router` uses of `optim`
    the learning rate, the batch sizes, `epochs` and `precision`.
    """

    stage: Stage
    output_dir: str | None = None  # required
    start_from: str | None = None
    after: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    data: DataOptions = field(default_factory=DataOptions)
    optim: Optim = field(default_factory=Optim)
    lora: Lora | None = None
    moe: Moe = field(default_factory=Moe)
    logging: Logging = field(default_factory=Logging)
    saving: Saving = field(default_factory=Saving)
    evaluation: Evaluation = field(default_factory=Evaluation)
    parallel: Literal["ddp", "fsdp2"] = (
        "ddp"  # of several processes; FSDP and DeepSpeed configs of accelerate win
    )
    seed: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file, the name of a packaged one (`recipe_names()`), or a mapping.
        overrides: `key=value`, values in YAML; dots go into sections: `optim.learning_rate=1e-4`.

    Raises:
        OSError: if there is no such file or name.
        ValueError: for an unknown key, with the nearest known one; for a value of another type than the key's.
    """
    settings = dict(source) if isinstance(source, Mapping) else _read(source)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(
                f"{override!r} is no setting. Type key=value, such as optim.learning_rate=1e-4."
            )
        _set(settings, name, yaml.safe_load(text))
    if "stage" not in settings:
        raise ValueError(
            f"The recipe has no stage. Choose one of {', '.join(typing.get_args(Stage))}."
        )
    recipe = _from_mapping(Recipe, settings, "")
    _require_used(recipe)
    return replace(recipe, moe=replace(recipe.moe, config=_moe_config(recipe.moe.config)))


def _require_used(recipe: Recipe) -> None:
    """A setting that its stage would not look at is a mistake."""
    if recipe.stage == "router":
        unused = {
            "lora": recipe.lora,
            "trainable": recipe.trainable,
            "trainer": recipe.trainer,
            "data.packing": recipe.data.packing,
            "data.features": recipe.data.features,
            "optim.max_steps": recipe.optim.max_steps,
        }
    else:
        unused = {"moe": recipe.moe != Moe() and recipe.stage != "experts"}
    for name, value in unused.items():
        if value:
            raise ValueError(f"{name} does nothing in stage {recipe.stage!r}. Leave it out.")


def _moe_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture's fields in their own types; the rest of the checks is `LlamaMoeConfig`'s."""
    floats = {item.name for item in fields(LlamaMoeConfig) if item.type is float}
    known = [f"moe.config.{option}" for option in MOE_OPTIONS]
    for name in settings:
        if name not in MOE_OPTIONS:
            raise unknown_name("recipe key", f"moe.config.{name}", known)
    return {
        name: _convert(value, float, f"moe.config.{name}") if name in floats else value
        for name, value in settings.items()
    }


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as a YAML file holds them."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(asdict(recipe))))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source).expanduser()
    if not path.is_file() and str(source) in recipe_names():
        path = FOLDER / f"{source}.yaml"
    if not path.is_file():
        near = str(unknown_name("recipe", str(source), recipe_names()))
        raise FileNotFoundError(
            f"There is no recipe file {str(source)!r}, and no packaged one. {near}"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} holds a {type(settings).__name__}; expected keys such as stage and data."
        )
    return settings


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    known = []
    for item in fields(cls):
        inner = _dataclass_in(typing.get_type_hints(cls)[item.name])
        known += _known_keys(inner, f"{prefix}{item.name}.") if inner else [f"{prefix}{item.name}"]
    return known


def _dataclass_in(hint: Any) -> type | None:
    return next((option for option in (hint, *typing.get_args(hint)) if is_dataclass(option)), None)  # type: ignore[return-value]


def _unknown_key(name: str) -> ValueError:
    """Names the nearest key; one whose last word is what was typed is nearer than any spelling."""
    known = _known_keys(Recipe)
    same_word = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if same_word and name not in known:
        return ValueError(
            f"Unknown recipe key {name!r}. Did you mean {same_word[0]!r}? Known: {', '.join(known)}."
        )
    return unknown_name("recipe key", name, known)


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        inner = settings.get(section)
        settings[section] = dict(inner) if isinstance(inner, Mapping) else {}
        settings = settings[section]
    settings[last] = value


def _from_mapping(cls: type, settings: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in settings:
        if name not in hints:
            raise _unknown_key(f"{prefix}{name}")
    return cls(
        **{
            name: _convert(value, hints[name], f"{prefix}{name}")
            for name, value in settings.items()
        }
    )


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type that the field declares; YAML reads 1e-3 as text and 1 as a whole number."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    inner = _dataclass_in(hint)
    if inner is not None:
        if isinstance(value, Mapping):
            return _from_mapping(inner, value, f"{key}.")
        if value is None and type(None) in options:
            return None
        raise ValueError(
            f"{key} is {value!r}, but it is a section with the keys {', '.join(_known_keys(inner))}."
        )
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Literal:
            if value in typing.get_args(option):
                return value
            raise unknown_name(key, str(value), [str(choice) for choice in typing.get_args(option)])
        if origin is tuple and isinstance(value, list | tuple | str):
            return (value,) if isinstance(value, str) else tuple(map(str, value))
        if origin is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        if origin in (Mapping, typing.get_origin(Mapping[str, Any])) and isinstance(value, Mapping):
            return dict(value)
        if (
            isinstance(origin, type)
            and isinstance(value, origin)
            and (origin is bool) == isinstance(value, bool)
        ):
            return value
    wanted = " or ".join(
        "nothing" if option is type(None) else str(getattr(option, "__name__", option))
        for option in options
    )
    raise ValueError(f"{key} is {value!r}, a {type(value).__name__}; expected {wanted}.")
