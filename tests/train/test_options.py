"""Tokens in a recipe are neither written nor printed."""

import pytest

from moellava.train import train
from moellava.train.options import is_secret, recipe_to_dict
from tests.train.tiny import parts_of, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")
TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hub_token", "anything"),
        ("HF_TOKEN", "anything"),
        ("api_key", "anything"),
        ("password", "anything"),
        ("access-key", "anything"),
        ("run_name", TOKEN),
        ("train", "https://me:secret@example.org/rows.json"),
    ],
)
def test_a_secret_is_known_by_its_name_or_its_look(key, value):
    assert is_secret(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_new_tokens", "32"), ("train", "rows.json"), ("image_token_index", 3), ("token", None)],
)
def test_what_only_sounds_like_one_is_kept(key, value):
    assert not is_secret(key, value)


def test_tokens_reach_neither_the_folder_nor_an_error(tiny, tmp_path):
    settings = [f"trainer.hub_token={TOKEN}", "optim.max_steps=2"]
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", *settings)
    train(recipe, show_progress=False)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.parent.name == "checkpoint-2" for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    other = tiny_recipe(tiny, "tune", tmp_path / "out", *settings, "seed=1")
    with pytest.raises(ValueError, match="another recipe") as caught:
        train(other, show_progress=False)
    assert TOKEN not in str(caught.value)
    # A run resumes with another token, and without one.
    assert train(tiny_recipe(tiny, "tune", tmp_path / "out", settings[1])).was_finished


def test_an_error_about_a_model_does_not_print_its_token(tiny, tmp_path):
    model = {**parts_of(tiny), "token": TOKEN}
    recipe = tiny_recipe(
        tiny, "tune", tmp_path / "out", start_from=str(tiny), after="any", model=model
    )
    with pytest.raises(ValueError, match="start_from is") as caught:
        train(recipe, show_progress=False)
    assert TOKEN not in str(caught.value)
    assert "token" not in recipe_to_dict(recipe)["model"]
