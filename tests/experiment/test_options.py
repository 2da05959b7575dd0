"""An experiment's own keys are typed, and mistakes suggest the nearest."""

import pytest

from moellava.experiment import load_experiment
from tests.experiment.tiny import experiment_settings


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sedes": [1]}, "Unknown experiment key 'sedes'. Did you mean 'seeds'"),
        ({"seeds": [0, 0]}, r"seeds is \[0, 0\]; expected different whole numbers"),
        ({"seeds": ["a"]}, "seeds is .* expected"),
        ({"stages": []}, "has no stages"),
        ({"variants": {"a/b": {}}}, "'a/b' cannot name a folder"),
        ({"evaluation": {"data": "x", "scorers": ["strikt"]}}, "Did you mean 'strict'"),
        ({"evaluation": {"data": "x", "baselines": ["blnk"]}}, "Did you mean 'blank'"),
        ({"evaluation": {"data": "x", "batch_size": 0}}, "evaluation.batch_size is 0"),
        ({"evaluation": {"data": "x", "batchsize": 1}}, "Did you mean 'evaluation.batch_size'"),
        ({"evaluation": {}}, "'evaluation.data' is missing"),
    ],
)
def test_mistakes(tiny, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(experiment_settings(tiny, tmp_path, **more))


def test_words_stand_over_the_file(tiny, tmp_path):
    settings = experiment_settings(tiny, tmp_path)
    found = load_experiment(settings, ["seeds=[1, 2]", "evaluation.limit=5"])
    assert (found.seeds, found.evaluation.limit) == ((1, 2), 5)


def test_a_missing_file_and_a_file_without_keys(tmp_path):
    with pytest.raises(FileNotFoundError, match="no experiment file"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list.yaml holds a list"):
        load_experiment(tmp_path / "list.yaml")
