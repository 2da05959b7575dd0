"""`moellava experiment`: the plan, and mistakes in one line."""

import yaml
from typer.testing import CliRunner

from moellava.cli import app
from tests.experiment.tiny import experiment_settings
from tests.train.tiny import write_tiny

runner = CliRunner()


def test_a_dry_run_and_a_mistake(tmp_path):
    tiny = write_tiny(tmp_path / "tiny", num_rows=8)
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment_settings(tiny, tmp_path / "out")))
    done = runner.invoke(app, ["experiment", str(file), "seeds=[0, 1]", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "seeds 0, 1; 6 trainings" in done.output
    assert not (tmp_path / "out").exists()
    for word, message in (
        ("sedes=[1]", "Did you mean 'seeds'?"),
        ("evaluation.metrics=[strict.acc]", "Unknown metric in evaluation.metrics"),
    ):
        done = runner.invoke(app, ["experiment", str(file), word])
        assert done.exit_code == 1
        assert message in done.output
        assert done.output.count("\n") == 1
