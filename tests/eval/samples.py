"""Predictions and settings that several tests use."""

from moellava.eval.predictions import Prediction
from moellava.eval.settings import EvaluationSettings

EVIL = "</script><script>alert(1)</script><b>\u2028"


def prediction(number, answer, truth="yes", answer_type="closed", **more):
    return Prediction(
        id=f"{number}{EVIL}", images=(f"{number % 2}.png{EVIL}",), question=f"Is it {EVIL}?",
        answer=answer, truth=truth, answer_type=answer_type, answer_type_from="data",
        groups={"modality": EVIL}, **more,
    )  # fmt: skip


NEW = 4


def settings(**more):
    return EvaluationSettings(max_new_tokens=NEW, num_resamples=50, **more)
