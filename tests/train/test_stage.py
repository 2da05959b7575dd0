"""A stage is a row: one can be added from outside, and the guide's example runs."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from moellava import plugins
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import Stage, load_recipe, register_stage
from moellava.train.stage import STAGES, stage_of

pytestmark = pytest.mark.usefixtures("quick_runs", "stages")
GUIDE = Path(__file__).parents[2] / "docs" / "add_a_training_stage.md"


@pytest.fixture
def stages(monkeypatch):
    """The table, put back afterwards."""
    before = dict(STAGES)
    yield
    STAGES.clear()
    STAGES.update(before)


def row(name="polish", after="tune", **more):
    def nothing(*args):
        raise AssertionError

    more = {"trainable": ("projector",), "unused": ("moe",), "run": nothing, **more}
    return Stage(name=name, recipe="polish.yaml", after=after, plan=nothing, **more)


def test_the_guides_example_runs(chain, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "2").symlink_to(chain / "tune")
    (tmp_path / "train.json").symlink_to(tiny / "rows.json")
    (tmp_path / "images").symlink_to(tiny / "images")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    exec(compile("\n".join(snippets), GUIDE.name, "exec"), {"__name__": "guide"})
    assert "stage polish: trains 3,136 of" in capsys.readouterr().out
    tuned, polished, copied = (
        load_pretrained_model(run / "model").model.state_dict()
        for run in (chain / "tune", Path("runs/polish"), Path("runs/copy"))
    )
    changed = {name for name in tuned if not (tuned[name] == polished[name]).all()}
    assert changed
    assert all(name.startswith("model.multi_modal_projector.") for name in changed)
    assert all((tuned[name] == copied[name]).all() for name in tuned)


def test_a_stage_of_an_installed_package_is_found(monkeypatch):
    entry = EntryPoint("polish", "tests.train.test_stage:register_polish", "moellava.stages")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    plugins.load_plugins.cache_clear()
    assert stage_of(load_recipe({"stage": "polish"})).after == "tune"
    plugins.load_plugins.cache_clear()


def register_polish():
    register_stage(row())


def test_keys_that_a_stage_does_not_use_are_refused():
    register_stage(row(unused=("data.packing",)))
    assert load_recipe({"stage": "polish", "moe": {"noise": 0.1}}).moe.noise == 0.1
    with pytest.raises(ValueError, match=r"data\.packing does nothing in stage 'polish'"):
        load_recipe({"stage": "polish", "data": {"packing": True}})


def test_a_name_that_is_taken_and_an_unknown_stage_before_are_refused():
    with pytest.raises(ValueError, match="There is a stage 'tune' already"):
        register_stage(row(name="tune"))
    with pytest.raises(ValueError, match=r"Unknown stage in after: 'tun'. Did you mean 'tune'\?"):
        register_stage(row(after="tun"))


@pytest.mark.parametrize("name", ["align", "tune", "router", "experts"])
def test_a_stage_is_registered_again_without_harm(name):
    register_stage(STAGES[name])
