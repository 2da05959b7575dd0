"""What can be known before the first step is told before the first step."""

import json

import pytest

from moellava.experiment import load_experiment, plan_experiment, run_experiment
from moellava.experiment import run as experiment_run
from tests.experiment.tiny import experiment_settings


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    monkeypatch.setattr(experiment_run, "train", lambda recipe, **_: pytest.fail("it trained"))


def refused(tiny, out, message, **more):
    with pytest.raises((ValueError, OSError), match=message):
        run_experiment(load_experiment(experiment_settings(tiny, out, **more)))
    assert not out.exists()


def changed(settings, key, **keys):
    return {key: {**settings[key], **keys}}


def test_the_plan_counts_and_writes_nothing(tiny, tmp_path):
    text = plan_experiment(load_experiment(experiment_settings(tiny, tmp_path / "out")))
    assert "tiny: variants dense, mixture; seeds 0; 3 trainings" in text
    assert "8 questions about 6 images" in text
    dense, mixture = (line for line in text.splitlines() if line.startswith("  experts: 2 steps"))
    # Two layers of three matrices, 32 by 64; and four experts of half the width in their place.
    assert "trains 12,288 of" in dense
    assert f"trains {2 * 12_288 + 2 * 4 * 32:,} of" in mixture
    active = [int(line.split(" of them active")[0].split()[-1].replace(",", ""))
              for line in (dense, mixture)]  # fmt: skip
    assert active[1] - active[0] == 2 * 4 * 32  # the routers
    assert text.count("to do") == 5
    assert not (tmp_path / "out").exists()


def test_a_row_that_only_a_later_stage_reads(tiny, tmp_path):
    rows = json.loads((tiny / "rows.json").read_text())
    rows[1]["image"] = "gone.png"
    (tiny / "broken.json").write_text(json.dumps(rows))
    settings = experiment_settings(tiny, tmp_path / "out")
    late = {**settings["stages"][1], "data": {"train": str(tiny / "broken.json")}}
    message = "1 of 8 rows of data.train cannot be used: 'row1' .*gone.png"
    refused(tiny, tmp_path / "out", message, stages=[settings["stages"][0], late])


def test_rows_and_questions_of_the_evaluation(tiny, tmp_path):
    rows = json.loads((tiny / "rows.json").read_text())
    (tiny / "empty.png").write_bytes(b"")
    rows[2]["image"] = str(tiny / "empty.png")
    (tiny / "held_out.json").write_text(json.dumps(rows))
    settings = experiment_settings(tiny, tmp_path)
    cases = {
        "1 of 8 rows of evaluation.data cannot be used: 'row2'.*Mend or remove them": {
            "data": str(tiny / "held_out.json")
        },
        "Unknown metric in evaluation.metrics: 'strict.acuracy'. Did you mean 'strict.accuracy'": {
            "metrics": ["strict.acuracy"]
        },
        "other_image needs two different images": {"limit": 2, "baselines": ["other_image"]},
        "The question of row 'row0' has .* tokens": {"max_new_tokens": 5000},
        "other_image.json": {"train": str(tiny / "other_image.json")},
    }
    for message, keys in cases.items():
        refused(tiny, tmp_path / "out", message, **changed(settings, "evaluation", **keys))


def test_stages_that_could_not_run(tiny, tmp_path):
    settings = experiment_settings(tiny, tmp_path)
    optim = {**settings["common"]["optim"], "batch_size": 5}
    common = changed(settings, "common", optim=optim)
    refused(tiny, tmp_path / "out", "batch_size=5 is not a multiple", **common)
    data = {**settings["common"]["data"], "max_length": 20}
    common = changed(settings, "common", data=data)
    refused(tiny, tmp_path / "out", "rows have more than data.max_length=20", **common)
    moe = {"mixture": {"moe": {"config": {"num_experts": 2, "num_experts_per_tok": 3}}}}
    refused(tiny, tmp_path / "out", "num_experts_per_tok is 3", variants=moe)
    stages = [settings["stages"][0], {"stage": "experts", "trainable": ["experts", "meta_expert"]}]
    refused(tiny, tmp_path / "out", "trainable names 'meta_expert'", stages=stages)


def test_a_router_and_the_mixture_that_it_is_for(tiny, tmp_path):
    settings = experiment_settings(tiny, tmp_path)
    first = settings["stages"][0]
    router = {"stage": "router", "optim": {"epochs": 1, "max_steps": None},
              "moe": {"config": {"num_experts": 4, "moe_layers": [0]}}}  # fmt: skip
    experts = {"stage": "experts", "moe": {"config": {"moe_layers": [1], "num_experts": 4}}}
    stages = [first, router, experts]
    message = r"fitted to the layers \[0\], but stage 'experts' makes the layers \[1\] sparse"
    refused(tiny, tmp_path / "out", message, stages=stages, variants={"mixture": {}})
    router["moe"]["config"]["num_experts"] = 3
    message = "4 modalities .*moe.config.num_experts is 3"
    refused(tiny, tmp_path / "out", message, stages=stages, variants={"mixture": {}})


def test_several_processes(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(tiny, tmp_path / "out", "runs in one process")
