"""Rows that a recipe names are read and measured before a step."""

import pytest

from moellava.train import train
from tests.train.tiny import tiny_recipe


def test_rows_that_are_too_long_are_named_before_a_step(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"20 of 20 rows have more than data.max_length=10 tokens: 'row0' \(\d+\)"
    ):
        train(tiny_recipe(tiny, "tune", tmp_path / "x", "data.max_length=10"), show_progress=False)


def test_missing_data_is_asked_for(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"names no training data. Add data.train=FILE"):
        train(tiny_recipe(tiny, "tune", tmp_path / "x", "data.train=null"), show_progress=False)


def test_data_without_rows_is_named(tiny, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    recipe = tiny_recipe(tiny, "tune", tmp_path / "x", f"data.evaluation={tmp_path / 'none.json'}")
    with pytest.raises(ValueError, match=r"none.json"):
        train(recipe, show_progress=False)
