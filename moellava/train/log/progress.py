"""The bar of a run: `ProgressBar`."""

from typing import Any

from transformers import ProgressCallback

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
    """transformers' bar; of each log entry it shows what a person reads, not a number per expert."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: f"{logs[name]:.4g}" for name in SHOWN if name in logs}
        if shown and state.is_world_process_zero and self.training_bar is not None:
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}  {words}")
