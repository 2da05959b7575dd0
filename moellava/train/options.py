"""The settings of one stage of training, typed and frozen: `Recipe` and its sections."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field

# Names such as hub_token, HF_TOKEN, api_key, password; and, under any name, tokens of Hugging Face,
# GitHub and OpenAI, and an address with a password in it.
_SECRET_KEY = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|credentials?|(api|access|private|secret)[_-]?key)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"\b(hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}|://[^/@\s]+:[^/@\s]+@")

Number = TypeVar("Number", int, float)
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]


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
    max_length: Positive[int] | None = 2048  # tokens of a row, image placeholders included
    long_rows: Literal["error", "truncate"] = "error"
    # One sequence of the rows of a device's batch instead of padding; no row attends to another.
    packing: bool = False
    group_by_length: bool = True
    num_workers: NotNegative[int] = 4  # processes that open images and tokenize
    # A file that keeps what the frozen tower makes of each image, so that it runs once. Images in
    # files are known by their paths: delete it if they have changed.
    features: str | None = None


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Batches, schedule, optimizer and precision."""

    learning_rate: NotNegative[float] = 2e-5
    # Of parts that learn at another rate, by their names in `moellava.train.parts.PARTS`; the
    # schedule is the same for all.
    rates: Mapping[str, NotNegative[float]] = field(default_factory=dict)
    # Rows per optimizer step, over all devices; what does not fit at once is accumulated.
    batch_size: Positive[int] = 128
    per_device_batch_size: Positive[int] = 8
    epochs: Positive[float] = 1.0
    max_steps: Positive[int] | None = None  # optimizer steps, in place of `epochs`
    schedule: str = "cosine"  # any of transformers' schedulers
    warmup: NotNegative[float] = 0.03  # share of the steps
    weight_decay: NotNegative[float] = 0.0
    max_grad_norm: NotNegative[float] = 1.0
    optimizer: str = "adamw_torch"  # any of transformers' optimizers
    # bf16: bfloat16 arithmetic on float32 weights; bf16_weights: bfloat16 weights too (half the
    # memory, and small updates are lost to rounding); fp32.
    precision: Literal["bf16", "bf16_weights", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters by PEFT, in place of what `trainable` would train in the language model.

    `parts` names the parts of `trainable` that get them, if not those of the language model; the
    others are trained whole.
    """

    parts: tuple[str, ...] = ()
    rank: Positive[int] = 64
    alpha: Positive[int] = 128
    dropout: NotNegative[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class Moe:
    """How a dense model becomes a mixture."""

    config: Mapping[str, object] = field(default_factory=dict)  # fields of `LlamaMoeConfig`
    noise: NotNegative[float] = 0.0  # standard deviation, added to the experts' copies
    keep_function: bool = True
    router: str | None = None  # run folder of a `router` stage, or a file with a router's weights


@dataclass(frozen=True, kw_only=True)
class Reward:
    """How answers are drawn and rewarded in stage `reward`.

    `optim.batch_size` counts answers there: each question of a step has `num_answers` of them.
    """

    # Rules of `moellava eval`, each a reward; their sum is what an answer earns.
    scorers: tuple[str, ...] = ("strict",)
    # Also 1 for `<think>...</think><answer>...</answer>`.
    format: bool = False
    num_answers: Annotated[int, Field(ge=2)] = 8  # to each question; compared with one another
    max_new_tokens: Positive[int] = 64
    temperature: Positive[float] = 1.0
    kl: NotNegative[float] = 0.04  # weight of the divergence from the start


@dataclass(frozen=True, kw_only=True)
class Logging:
    """How often a step is logged, and where to beside `log.json`."""

    every: Positive[int] = 1  # optimizer steps
    report_to: tuple[str, ...] = ("tensorboard",)  # also wandb, mlflow, ...: transformers' names


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How often a checkpoint is written, and how many stay."""

    every: Positive[int] = 500  # optimizer steps between checkpoints
    keep: Positive[int] = 2  # newest checkpoints that stay


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How often and on how much of `data.evaluation` the model is tested while it trains."""

    every: Positive[int] = 500  # optimizer steps
    num_rows: Positive[int] | None = None  # first held-out rows that are used; None is all
    num_answers: NotNegative[int] = 8  # held-out questions that are answered into the log
    # Rules of `moellava eval`, such as strict: they score the answers to all of those rows.
    scorers: tuple[str, ...] = ()
    max_new_tokens: Positive[int] = 32


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One stage of training.

    `start_from` is the folder of the stage before, or any saved model; without it, `model` names
    the parts, with the keys of `load_pretrained_model`. `after` is the stage that the start has to
    come from (`any` takes every model); `trainable` are names of `moellava.train.parts.PARTS`; left
    out, both are the stage's usual ones. `trainer` goes to transformers' `TrainingArguments`
    as it is. Which stages there are, and which keys do nothing in one: `moellava.train.stages`.
    """

    stage: str
    output_dir: str | None = None  # required
    start_from: str | None = None
    after: str | None = None
    model: Mapping[str, object] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    tower_blocks: Positive[int] | None = None  # train only the last so many blocks of the tower
    data: DataOptions = field(default_factory=DataOptions)
    optim: Optim = field(default_factory=Optim)
    lora: Lora | None = None
    moe: Moe = field(default_factory=Moe)
    reward: Reward = field(default_factory=Reward)
    logging: Logging = field(default_factory=Logging)
    saving: Saving = field(default_factory=Saving)
    evaluation: Evaluation = field(default_factory=Evaluation)
    # Of several processes; accelerate's own FSDP and DeepSpeed configs take precedence.
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    seed: int = 0
    trainer: Mapping[str, object] = field(default_factory=dict)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as a YAML file holds them; tokens and passwords are left out."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(without_secrets(asdict(recipe))))
    return plain


def without_secrets(value: object) -> object:
    """Plain values of settings that may be written or printed, nested ones included."""
    if isinstance(value, Mapping):
        return {
            str(key): without_secrets(item)
            for key, item in value.items()
            if not is_secret(str(key), item)
        }
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def is_secret(key: str, value: object) -> bool:
    """Whether a setting holds a token or password, by its name or by its look."""
    if not isinstance(value, str):
        return False
    return bool(_SECRET_KEY.search(key) or _SECRET_VALUE.search(value))
