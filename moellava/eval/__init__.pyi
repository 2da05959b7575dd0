from .metrics import is_exact_answer as is_exact_answer
from .predictions import Prediction as Prediction
from .predictions import read_predictions as read_predictions
from .run import evaluate as evaluate
from .scorers import Scorer as Scorer
from .scorers import find_scorers as find_scorers
from .scorers import register_scorer as register_scorer
from .settings import EvaluationSettings as EvaluationSettings

__all__ = [
    "EvaluationSettings",
    "Prediction",
    "Scorer",
    "evaluate",
    "find_scorers",
    "is_exact_answer",
    "read_predictions",
    "register_scorer",
]
