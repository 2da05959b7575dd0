"""The bar of a run: `ProgressBar`."""

from collections.abc import Sequence

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = (
    "loss",
    "aux_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "eval_loss",
    "eval_answers_exact",
)


class ProgressBar(ProgressCallback):
    """transformers' bar; of each log entry it shows what people read, not a number per expert.

    Args:
        scorers: whose metrics are shown, too.
    """

    def __init__(self, scorers: Sequence[str] = ()) -> None:
        super().__init__()
        self._scores = tuple(f"eval_{scorer}_" for scorer in scorers)

    def close(self) -> None:
        """Close the bars; what is printed next begins on a line of its own."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        named = [*SHOWN, *(name for name in logs if name.startswith(self._scores))]
        shown = {name: f"{logs[name]:.4g}" for name in named if name in logs}
        if shown and state.is_world_process_zero and self.training_bar is not None:
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}  {words}")
