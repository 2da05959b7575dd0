"""The stages that made a model stay beside its weights."""

import pytest

import moellava
from moellava.train.log.history import HISTORY_FILE, read_history, write_history


def test_a_stage_stands_after_those_it_started_from(tmp_path):
    align, tune = tmp_path / "align", tmp_path / "tune"
    align.mkdir()
    tune.mkdir()
    write_history(align, None, stage="align", steps=3)
    write_history(tune, align, stage="tune", steps=5)
    version = moellava.__version__
    assert read_history(tune) == [
        {"stage": "align", "steps": 3, "moellava": version},
        {"stage": "tune", "steps": 5, "moellava": version},
    ]


def test_a_model_of_somebody_elses_has_none(tmp_path):
    assert read_history(tmp_path) == read_history(None) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": 3}', '{"stages": [{"steps": 3}]}'])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / HISTORY_FILE).write_text(text)
    with pytest.raises(ValueError, match=HISTORY_FILE):
        read_history(tmp_path)
