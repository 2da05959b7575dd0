"""Everything that can be known before the first step: `check_runs` looks, `describe` tells.

Every row of every data set is looked at (its answer, its length, whether its images open), and the
models of all stages are outlined on torch's meta device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moellava.eval.answering import ask_about, true_prediction
from moellava.eval.asking import Asker
from moellava.eval.baselines import BASELINES, changed_question
from moellava.eval.evaluation_data import read_evaluation_data, rows_of
from moellava.eval.prompts import find_prompt
from moellava.eval.score_table import score_predictions
from moellava.eval.scorers import find_scorers
from moellava.experiment.options import Experiment
from moellava.experiment.runs import Run, StageRun
from moellava.messages import unknown_name
from moellava.model.describe import count_active_parameters
from moellava.model.language_model import moe_config_from_dense
from moellava.model.loaded_model import LoadedModel
from moellava.train.arguments import training_arguments
from moellava.train.batches import TrainData, build_collator, read_data, row_lengths
from moellava.train.checkpoints import newest_checkpoint
from moellava.train.plan import count_steps
from moellava.train.prepare import choose_learning, outline_model, outline_stage
from moellava.train.router_fit import expert_labels
from moellava.train.run_folder import MODEL_FOLDER, require_same_recipe
from moellava.train.usable_rows import usable_rows


@dataclass(frozen=True)
class StageFacts:
    """A stage in numbers."""

    num_rows: int
    num_steps: int
    num_trained: int  # parameters
    num_parameters: int
    num_active: int  # parameters that a text token meets


@dataclass
class Checked:
    """What `check_runs` has seen.

    Args:
        stages: the facts of each stage of each variant.
        metrics: scorer and metric of all that the evaluation will give.
    """

    stages: dict[str, dict[str, StageFacts]] = field(default_factory=dict)
    metrics: list[tuple[str, str]] = field(default_factory=list)
    num_questions: int = 0
    num_images: int = 0


def check_runs(
    experiment: Experiment, runs: Sequence[Run], *, show_progress: bool = False
) -> Checked:
    """Look at the data and outline the models of every run; nothing is trained or written.

    Raises:
        OSError: data or a model cannot be read.
        ValueError: a row, a stage, a question or a setting that would stop the experiment later.
    """
    checked = Checked()
    read: dict[object, TrainData] = {}
    asked = _Questions(experiment, checked, show_progress)
    for run in runs:
        for stage in run.stages:
            require_same_recipe(stage.recipe, stage.folder)
        if run.seed != experiment.seeds[0]:
            continue  # seeds differ in nothing else
        outlined = None
        facts = checked.stages.setdefault(run.variant, {})
        router_layers = None
        for stage in run.stages:
            recipe = stage.recipe
            key = (recipe.data, recipe.evaluation.num_rows)
            if key not in read:
                read[key] = read_data(recipe, show_progress=show_progress)
            outlined = _outline(stage, outlined)
            if stage.stage.gives_router:
                router_layers = _router_layers(stage, outlined, read[key])
            elif stage.stage.makes_mixture and router_layers is not None:
                _require_layers(stage, outlined, router_layers)
            facts[stage.name] = _facts(stage, outlined, read[key])
        assert outlined is not None  # a run has stages
        asked.require_room(outlined)
    return checked


def describe(experiment: Experiment, runs: Sequence[Run], checked: Checked) -> str:
    """The plan of an experiment, for reading."""
    lines = [
        f"{experiment.name}: variants {', '.join(experiment.variants)}; "
        f"seeds {', '.join(map(str, experiment.seeds))}; "
        f"{len({stage.folder for run in runs for stage in run.stages})} trainings",
        f"each model is asked {checked.num_questions:,} questions about {checked.num_images:,} "
        f"images of {experiment.evaluation.data}; baselines: "
        f"{', '.join(experiment.evaluation.baselines) or 'none'}",
    ]
    for variant, stages in checked.stages.items():
        lines.append(f"variant {variant}")
        for name, facts in stages.items():
            lines.append(
                f"  {name}: {facts.num_steps:,} steps, {facts.num_rows:,} rows, trains "
                f"{facts.num_trained:,} of {facts.num_parameters:,} parameters, "
                f"{facts.num_active:,} of them active per token"
            )
    told = set()
    for run in runs:
        for stage in run.stages:
            if stage.folder not in told:
                told.add(stage.folder)
                lines.append(f"{_state(stage.folder):<16} {stage.folder}")
        state = "finished" if (run.evaluation_folder / "scores.json").is_file() else "to do"
        lines.append(f"{state:<16} {run.evaluation_folder}")
    return "\n".join(lines)


def _state(folder: Path) -> str:
    if (folder / MODEL_FOLDER).is_dir():
        return "finished"
    newest = newest_checkpoint(folder)
    return f"at {newest.name}" if newest else "to do"


def _outline(stage: StageRun, before: LoadedModel | None) -> LoadedModel:
    """The stage's model, of the outline of the stage before it."""
    recipe = stage.recipe
    training_arguments(recipe, show_progress=False)
    if before is None:
        return outline_model(recipe)
    if stage.stage.gives_router:
        return before
    return outline_stage(recipe, before.model.config, before.processor)


def _facts(stage: StageRun, outlined: LoadedModel, data: TrainData) -> StageFacts:
    recipe, model = stage.recipe, outlined.model
    row_lengths(data.train, build_collator(recipe, outlined.processor))
    trained = 0
    if not stage.stage.gives_router:
        learning = choose_learning(model, recipe)
        trained = sum(one.numel() for one in learning.parameters() if one.requires_grad)
    return StageFacts(
        num_rows=len(data.train),
        num_steps=count_steps(recipe.optim, len(data.train)),
        num_trained=trained,
        num_parameters=model.num_parameters(),
        num_active=count_active_parameters(model),
    )


def _router_layers(stage: StageRun, outlined: LoadedModel, data: TrainData) -> list[int]:
    text = outlined.model.config.text_config
    mixture = moe_config_from_dense(text, **stage.recipe.moe.config)
    expert_labels(data.train, mixture.num_experts)
    return list(mixture.moe_layer_indices)


def _require_layers(stage: StageRun, outlined: LoadedModel, fitted: Sequence[int]) -> None:
    layers = list(outlined.model.config.text_config.moe_layer_indices)
    if layers != fitted:
        raise ValueError(
            f"The router is fitted to the layers {list(fitted)}, but stage {stage.name!r} makes "
            f"the layers {layers} sparse. Use the same moe.config.moe_layers."
        )


class _Questions:
    """The evaluation's questions, looked at once, and held against each model's context."""

    def __init__(self, experiment: Experiment, checked: Checked, show_progress: bool) -> None:
        self.options = options = experiment.evaluation
        self.prompt = find_prompt(options.prompt)
        self.data = data = read_evaluation_data(
            options.data,
            split=options.split,
            images=options.images,
            language=options.language,
            limit=options.limit,
        )
        numbers = dict.fromkeys(question.row_number for question in data.questions)
        usable_rows(
            [data.rows[number] for number in numbers],
            "evaluation.data",
            skip_bad=False,
            show_progress=show_progress,
            remedy="Mend or remove them.",
        )
        if options.train is not None:
            rows_of(options.train, images=options.images)
        for name in options.baselines:
            for question in data.questions if name in BASELINES else ():
                changed_question(name, question, list(data.places), data.name)
        checked.num_questions, checked.num_images = len(data.questions), len(data.places)
        checked.metrics = self._metrics()
        known = [".".join(metric) for metric in checked.metrics]
        for name in options.metrics:
            if name not in known:
                raise unknown_name("metric in evaluation.metrics:", name, known)

    def _metrics(self) -> list[tuple[str, str]]:
        """Those that the questions have, told by scoring the truths."""
        truths = [true_prediction(question) for question in self.data.questions]
        return score_predictions(truths, find_scorers(self.options.scorers)).metrics

    def require_room(self, outlined: LoadedModel) -> None:
        """Raise `ValueError` for a question that does not fit into the model's context."""
        asker = Asker(outlined, self.data.load, max_new_tokens=self.options.max_new_tokens)
        asker.check([ask_about(question, self.prompt) for question in self.data.questions])
