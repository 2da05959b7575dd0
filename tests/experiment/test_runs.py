"""An experiment's stages, variants and seeds become recipes and folders."""

import pytest

from moellava.experiment import load_experiment
from moellava.experiment.runs import plan_runs
from tests.experiment.tiny import experiment_settings


def plan(tiny, tmp_path, **more):
    return plan_runs(load_experiment(experiment_settings(tiny, tmp_path / "out", **more)))


def folders(run, tmp_path):
    return [stage.folder.relative_to(tmp_path / "out").as_posix() for stage in run.stages]


def test_stages_that_variants_share_are_trained_once(tiny, tmp_path):
    dense, mixture = plan(tiny, tmp_path)
    assert folders(dense, tmp_path) == ["dense/seed-0/1-tune", "dense/seed-0/2-experts"]
    assert folders(mixture, tmp_path) == ["dense/seed-0/1-tune", "mixture/seed-0/2-experts"]
    tune = dense.stages[0].folder
    assert [run.stages[1].recipe.start_from for run in (dense, mixture)] == [str(tune)] * 2


def test_runs_go_seed_by_seed_and_differ_in_their_seed(tiny, tmp_path):
    runs = plan(tiny, tmp_path, seeds=[3, 5])
    assert [(run.seed, run.variant) for run in runs] == [
        (3, "dense"), (3, "mixture"), (5, "dense"), (5, "mixture"),
    ]  # fmt: skip
    assert [run.stages[1].recipe.seed for run in runs] == [3, 3, 5, 5]
    assert runs[0].stages[0].folder != runs[2].stages[0].folder


def test_moe_false_trains_the_dense_layers_in_place_of_the_experts(tiny, tmp_path):
    dense, mixture = plan(tiny, tmp_path)
    recipe = dense.stages[1].recipe
    assert (recipe.stage, recipe.after, recipe.trainable) == ("tune", "tune", ("mlp",))
    assert recipe.optim == mixture.stages[1].recipe.optim
    assert mixture.stages[1].recipe.moe.config["num_experts"] == 4


def test_the_path_of_med_moe_has_a_router_and_its_dense_variant_none(tiny, tmp_path):
    stages = [
        {"stage": "tune", "after": "any", "model": {"mm_vision_tower": "a"}},
        {"recipe": "med_moe_router", "optim": {"epochs": 1}},
        {"recipe": "med_moe_experts"},
    ]
    moe = {"config": {"moe_layers": [1], "num_experts": 3}}
    common = {"optim": {"batch_size": 4, "per_device_batch_size": 4}}
    variants = {"mixture": {"moe": moe}, "dense": {"moe": False}}
    mixture, dense = plan(tiny, tmp_path, stages=stages, common=common, variants=variants)
    tune, router, experts = mixture.stages
    assert router.recipe.start_from == experts.recipe.start_from == str(tune.folder)
    assert experts.recipe.moe.router == str(router.folder)
    assert router.recipe.moe.config == moe["config"]
    assert experts.recipe.moe.config["router_frozen"] is True
    assert [stage.name for stage in dense.stages] == ["tune", "experts"]
    assert dense.stages[1].recipe.trainable == ("mlp",)
    assert mixture.model_folder == experts.folder / "model"


def test_keys_stand_over_each_other_recipe_common_stage_variant(tiny, tmp_path):
    stages = [{"recipe": "stage2_tune", "name": "first", "after": "any", "model": {"a": "b"},
               "optim": {"warmup": 0.2, "weight_decay": 0.2, "epochs": 2}}]  # fmt: skip
    common = {"optim": {"learning_rate": 0.1, "warmup": 0.1, "weight_decay": 0.1, "epochs": 1}}
    variants = {
        "base": {},
        "other": {
            "optim": {"weight_decay": 0.3, "epochs": 3},
            "stages": {"first": {"optim": {"epochs": 4}}},
        },
    }
    base, other = plan(tiny, tmp_path, stages=stages, common=common, variants=variants)
    optim = base.stages[0].recipe.optim
    assert (optim.learning_rate, optim.warmup, optim.weight_decay, optim.epochs) == (
        0.1, 0.2, 0.2, 2.0,
    )  # fmt: skip
    assert optim.batch_size == 128  # the packaged recipe's
    optim = other.stages[0].recipe.optim
    assert (optim.weight_decay, optim.epochs) == (0.3, 4.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output_dir": None}, "has no output_dir. Add output_dir=runs/NAME"),
        ({"common": {"seed": 1}}, "common has seed, which the experiment itself sets"),
        ({"common": {"optim": {"lr": 1}}}, "'optim.lr'. Did you mean 'optim.learning_rate'"),
        ({"stages": [{"stage": "expert"}]}, "Unknown stage 'expert'.*Did you mean 'experts'"),
        ({"stages": [{"recipe": "stage2_tun"}]}, "Did you mean 'stage2_tune'"),
        (
            {"stages": [{"stage": "align", "model": {"a": "b"}}, {"stage": "experts"}]},
            "stage 'experts' starts from a model of stage 'tune', but the stage before it is "
            "'align'",
        ),
        ({"stages": [{"stage": "tune"}] * 2}, "Two stages are called 'tune'"),
        ({"variants": {"a": {}, "b": {}}}, "'a' and 'b' have the same recipes"),
        ({"variants": {"a": {"stages": {"tuen": {}}}}}, "Did you mean 'tune'"),
        ({"variants": {"a": {"stages": {"tune": 3}}}}, "variants.a.stages.tune is 3; expected"),
        ({"variants": {"a": {"output_dir": "x"}}}, "variants.a has output_dir"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(tiny, tmp_path, more, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(tiny, tmp_path, **more)
