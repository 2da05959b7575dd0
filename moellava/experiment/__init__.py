"""One file for a whole experiment: stages, seeds, variants, evaluation, one table."""

from moellava.experiment.options import EvaluationOptions, Experiment
from moellava.experiment.reading import load_experiment
from moellava.experiment.run import plan_experiment, run_experiment

__all__ = [
    "EvaluationOptions",
    "Experiment",
    "load_experiment",
    "plan_experiment",
    "run_experiment",
]
