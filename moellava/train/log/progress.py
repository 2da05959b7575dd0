"""The bar of a run: `ProgressBar`."""

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
    """transformers' bar; of each log entry it shows what people read, not a number per expert."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        shown = {name: f"{logs[name]:.4g}" for name in SHOWN if name in logs}
        if shown and state.is_world_process_zero and self.training_bar is not None:
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}  {words}")
