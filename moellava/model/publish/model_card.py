"""A model card of what the config knows: tower, projector, language model, mixture, licence, data.

| name | what it does |
|---|---|
| `model_card` | the card of a joined model |
| `push_to_hub` | uploads model, processor and card |
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from moellava.model.describe import count_active_parameters
from moellava.model.publish.remote_code import write_remote_code
from moellava.model.quantization import num_weights
from moellava.model.tiling import Tiling
from moellava.storage.sources import Origin

logger = logging.getLogger(__name__)

TEXT = """\
---
{{ card_data }}
---

# {{ title }}

A vision-language model: an image encoder, a projector and a language model, joined by moellava.

| part | what it is |
|---|---|
| image encoder | {{ tower }} |
| projector | {{ projector }} |
| language model | {{ language_model }} |
| mixture of experts | {{ mixture }} |
| parameters | {{ parameters }} |

## Data

{{ data }}

## Evaluation

{{ evaluation }}

## Licence

{{ licence }}

## Use

```python
from moellava import load_pretrained_model

loaded = load_pretrained_model("{{ name }}")
print(loaded.answer("image.png", "What modality is this?"))
```

For research only. Not a medical device: do not use its answers for diagnosis or treatment.
"""


class PushOptions(TypedDict, total=False):
    """The keywords of `push_to_hub`, but for the processor."""

    licence: str | None
    datasets: Sequence[str]
    remote_code: bool
    commit_message: str
    commit_description: str | None
    private: bool | None
    token: bool | str | None
    revision: str | None
    create_pr: bool
    max_shard_size: int | str


def model_card(
    model: PreTrainedModel,
    name: str,
    *,
    licence: str | None = None,
    datasets: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
) -> ModelCard:
    """The card of a joined model.

    Args:
        model: a `MoeLlavaForConditionalGeneration`.
        name: the repo id or folder that the card's example opens; its last part is the title.
        licence: of the weights, as an identifier of the hub such as `mit`.
        datasets: what it was trained on: dataset ids of the hub, or plain words.
        results: of evaluations, values in 0..1.

    Returns:
        The card, with the hub's metadata (`base_model`, `license`, `datasets`, `pipeline_tag`,
        `model-index`);
        `str(card)` is the text of a README.md.
    """
    config = model.config
    vision, text = config.vision_config, config.text_config
    language_model, tower = _origins(config)
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["moellava", "mixture-of-experts", "medical-imaging"],
        license=licence,
        base_model=[part.name for part in (language_model, tower) if part and part.revision]
        or None,
        datasets=[dataset for dataset in datasets if _is_repo_id(dataset)] or None,
        model_name=_title(name) if results else None,
        eval_results=list(results) or None,
    )
    card: ModelCard = ModelCard.from_template(
        card_data,
        template_str=TEXT,
        title=_title(name),
        name=name,
        tower=f"{tower or 'not recorded'}: {vision.num_patches} patch tokens of width "
        f"{vision.hidden_size} from images of {vision.image_size} pixels, layer "
        f"{vision.select_layer}",
        projector=_projector(config),
        language_model=f"{language_model or 'not recorded'}: `{text.model_type}`, "
        f"{text.num_hidden_layers} layers of width {text.hidden_size}",
        mixture=_mixture(text),
        parameters=f"{num_weights(model):,}, of which {count_active_parameters(model):,} meet "
        "each text token",
        data="\n".join(f"- {dataset}" for dataset in datasets)
        or "The authors have not said what it was trained on.",
        evaluation="\n".join(map(_result_line, results)) or "Not recorded.",
        licence=_licence(licence, (language_model, tower)),
    )
    return card


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processor: ProcessorMixin | None = None,
    licence: str | None = None,
    datasets: Sequence[str] = (),
    remote_code: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
) -> str:
    """Upload a model, its processor and its card, in one commit; a card on the hub stays as it is.

    Args:
        model: a `MoeLlavaForConditionalGeneration`.
        processor: uploaded too if given.
        licence, datasets: as in `model_card`.
        remote_code: upload the model's code too, so that `trust_remote_code=True` opens it without
            moellava; needs the processor.
        commit_message, commit_description, private, token, revision, create_pr, max_shard_size: as
            in transformers' `push_to_hub`.

    Returns:
        The URL of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        if remote_code:
            write_remote_code(folder)
        if api.file_exists(repo_id, "README.md", revision=revision):
            logger.info("%s has a model card, which stays as it is", repo_id)
        else:
            card = model_card(model, repo_id, licence=licence, datasets=datasets)
            (Path(folder) / "README.md").write_text(str(card), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit)


def _origins(config: PreTrainedConfig) -> tuple[Origin | None, Origin | None]:
    """Of the language model and of the tower."""
    vision = config.vision_config
    return (
        Origin(config.language_model, config.language_model_revision)
        if config.language_model
        else None,
        Origin(vision.tower, vision.revision) if vision.tower else None,
    )


def _mixture(text_config: PreTrainedConfig) -> str:
    layers = getattr(text_config, "moe_layer_indices", None)
    if not layers:
        return "none, dense"
    meta = ", and one meta expert that is always on" if text_config.meta_expert else ""
    return (
        f"{len(layers)} of {text_config.num_hidden_layers} layers ({', '.join(map(str, layers))}): "
        f"{text_config.num_experts} experts of width {text_config.expert_width}, "
        f"top-{text_config.num_experts_per_tok}{meta}"
    )


def _licence(licence: str | None, origins: tuple[Origin | None, Origin | None]) -> str:
    parts = " and ".join(origin.name for origin in origins if origin)
    own = f"`{licence}`." if licence else "The authors have not stated one for the trained weights."
    return f"{own} The licences of {parts} hold for what comes from them." if parts else own


def _title(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _result_line(result: EvalResult) -> str:
    where = (
        f"{result.dataset_name} ({result.dataset_split})"
        if result.dataset_split
        else (result.dataset_name)
    )
    value = f"{100 * result.metric_value:.1f} %"
    return f"- {where}: {value} {result.metric_name or result.metric_type}"


def _is_repo_id(name: str) -> bool:
    return name.count("/") == 1 and " " not in name


def _projector(config: PreTrainedConfig) -> str:
    start = f"`{config.projector_type}`: {config.num_image_tokens} image tokens"
    if config.tiling is None:
        return f"{start} per image"
    return f"{start} per view, {Tiling(**config.tiling)}"
