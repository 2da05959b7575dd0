"""What a recipe becomes of transformers' arguments, and what is refused."""

import pytest

from moellava.train import arguments, train
from tests.train.tiny import tiny_recipe


def test_a_batch_that_cannot_be_divided_is_refused(tiny, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"optim.batch_size=4 is not a multiple of optim.per_device_batch_size=3 times 1",
    ):
        train(
            tiny_recipe(tiny, "tune", tmp_path / "x", "optim.per_device_batch_size=3"),
            show_progress=False,
        )


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("trainer.torch_compil=true", ValueError, r"Did you mean 'trainer.torch_compile'\?"),
        (
            "trainer.learning_rate=1",
            ValueError,
            r"trainer.learning_rate has a key of its own in the recipe",
        ),
        (
            "trainer.save_only_model=true",
            ValueError,
            r"save_only_model would break whole checkpoints or exact resuming",
        ),
        ("logging.report_to=[tensorbord]", ValueError, r"Did you mean 'tensorboard'\?"),
        (
            "logging.report_to=[wandb, mlflow]",
            ImportError,
            r"'wandb', which is not installed. Type: pip install wandb",
        ),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(
    setting, error, message, tiny, tmp_path, monkeypatch
):

    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(error, match=message):
        train(tiny_recipe(tiny, "tune", tmp_path / "x", setting), show_progress=False)


def test_wandb_and_mlflow_are_the_trainers_own_callbacks(tiny, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(
        arguments, "get_available_reporting_integrations", lambda: ["wandb", "mlflow"]
    )
    chosen = arguments.training_arguments(
        tiny_recipe(tiny, "tune", tmp_path, "logging.report_to=[wandb, mlflow]")
    )
    found = integration_utils.get_reporting_integration_callbacks(chosen.report_to)
    assert [callback.__name__ for callback in found] == ["WandbCallback", "MLflowCallback"]
