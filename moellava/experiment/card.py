"""The scores of a run in the model card of its checkpoint: `write_card`."""

import json
from pathlib import Path

import torch
from huggingface_hub import EvalResult

from moellava.experiment.options import Experiment
from moellava.experiment.results import Json
from moellava.experiment.runs import Run
from moellava.experiment.table import entry_of
from moellava.model.checkpoint.configs import load_model_config
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.publish.model_card import model_card
from moellava.storage.writing import write_text

CARD_FILE = "README.md"
TASK = "visual-question-answering"


def write_card(run: Run, experiment: Experiment) -> None:
    """Write `README.md` beside the weights, with the hub's `model-index`.

    A card that says the same is left alone.
    """
    scores: Json = json.loads((run.evaluation_folder / "scores.json").read_text(encoding="utf-8"))
    options = experiment.evaluation
    name = f"{experiment.name}-{run.variant}-seed-{run.seed}"
    results = [
        _result(metric, scores, _public_name(options.data), options.split)
        for metric in options.metrics
        if entry_of(scores["scorers"], metric) is not None
    ]
    config = load_model_config(run.model_folder)
    assert isinstance(config, MoeLlavaConfig)  # a stage wrote it
    with torch.device("meta"):  # the card tells of the config and of the number of parameters
        model = MoeLlavaForConditionalGeneration(config)
    trained_on = [_public_name(stage.recipe.data.train or "") for stage in run.stages]
    card = model_card(model, name, datasets=list(dict.fromkeys(trained_on)), results=results)
    write_text(run.model_folder / CARD_FILE, str(card) + "\n")


def _result(metric: str, scores: Json, data: str, split: str | None) -> EvalResult:
    scorer, _, name = metric.partition(".")
    entry = entry_of(scores["scorers"], metric)
    assert entry is not None  # chosen by the caller
    version = scores["scorers"][scorer]["version"]
    low, high = (100 * entry[bound] for bound in ("low", "high"))
    return EvalResult(
        task_type=TASK,
        dataset_type=data,
        dataset_name=data,
        dataset_split=split,
        metric_type=name,
        metric_name=f"{name} by moellava's {scorer} {version}, 95 % interval over images "
        f"{low:.1f} to {high:.1f} %, {entry['n']} questions",
        metric_value=round(entry["value"], 4),
    )


def _public_name(data: str) -> str:
    """A hub id as it is; of a path on this machine its last part."""
    return Path(data).name if Path(data).expanduser().exists() else data
