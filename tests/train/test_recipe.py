import pytest
import yaml

from moellava.settings import known_keys
from moellava.train.options import Recipe, recipe_to_dict
from moellava.train.recipe import FOLDER, MEANINGS, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_can_be_read_and_names_its_sources(name):
    recipe = load_recipe(name)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert "arXiv" in text or "LLaVA-1.5" in text
    assert load_recipe(recipe_to_dict(recipe)) == recipe


# MoE-LLaVA (arXiv 2401.15947), table 2; Med-MoE (arXiv 2404.10237), table 11 and its scripts.
@pytest.mark.parametrize(
    ("name", "stage", "learning_rate", "batch_size", "epochs"),
    [
        ("stage1_align", "align", 1e-3, 256, 1),
        ("stage2_tune", "tune", 2e-5, 128, 3),
        ("stage3_experts", "experts", 2e-5, 128, 1),
        ("med_moe_experts", "experts", 2e-5, 128, 9),
        ("med_moe_router", "router", 1e-3, 32, 10),
    ],
)
def test_the_recipes_hyper_parameters_are_the_papers(
    name, stage, learning_rate, batch_size, epochs
):
    recipe = load_recipe(name)
    optim = recipe.optim
    assert (recipe.stage, optim.learning_rate, optim.batch_size, optim.epochs) == (
        stage, learning_rate, batch_size, epochs,
    )  # fmt: skip
    if stage != "router":
        assert (optim.schedule, optim.warmup, optim.weight_decay, optim.precision) == (
            "cosine",
            0.03,
            0.0,
            "bf16",
        )


def test_settings_override_the_file_and_leave_the_rest():
    settings = [
        "optim.learning_rate=1e-4",
        "lora.rank=8",
        "logging.report_to=[wandb, mlflow]",
        "data.max_length=null",
    ]
    recipe = load_recipe("stage1_align", settings)
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.optim.batch_size == 256
    assert recipe.lora.rank == 8
    assert recipe.logging.report_to == ("wandb", "mlflow")
    assert recipe.data.max_length is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "optim.learning_rte=1",
            r"Unknown recipe key 'optim.learning_rte'. Did you mean 'optim.learning_rate'\?",
        ),
        (
            "learning_rate=1",
            r"Unknown recipe key 'learning_rate'. Did you mean 'optim.learning_rate'\?",
        ),
        ("optim.lr=1", r"key 'optim.lr'. Did you mean 'optim.learning_rate'\?"),
        ("bs=1", r"key 'bs'. Did you mean 'optim.batch_size'\?"),
        ("lora.r=1", r"key 'lora.r'. Did you mean 'lora.rank'\?"),
        ("optim.batch_size=-4", r"optim.batch_size is -4; expected more than 0"),
        ("optim.epochs=0", r"optim.epochs is 0; expected more than 0"),
        ("optim.epochs=-1", r"optim.epochs is -1; expected more than 0"),
        ("optim.max_steps=0", r"optim.max_steps is 0; expected more than 0"),
        ("saving.keep=-1", r"saving.keep is -1; expected more than 0"),
        ("saving.keep=0", r"saving.keep is 0; expected more than 0"),
        ("moe.noise=.nan", r"moe.noise is nan; expected a finite number"),
        ("optim.learning_rate=.inf", r"optim.learning_rate is inf; expected a finite number"),
        ("model=[", r"model=\[ is not valid YAML"),
        ("outputdir=a", r"Did you mean 'output_dir'\?"),
        ("moe.config.num_expert=2", r"Did you mean 'moe.config.num_experts'\?"),
        ("stage=alig", r"Unknown stage 'alig'. Did you mean 'align'\?"),
        ("optim.batch_size=many", r"optim.batch_size is 'many'; expected a whole number"),
        ("data.skip_bad=3", r"data.skip_bad is 3; expected true or false"),
        ("data=x.json", r"data is 'x.json', but it is a section with the keys train"),
        ("fast", r"'fast' is not a setting. Type key=value"),
    ],
)
def test_a_mistyped_setting_is_named_with_the_nearest(setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("stage3_experts", [setting])


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        ("stage1_align", "moe.noise=0.1", "moe does nothing in stage 'align'"),
        ("med_moe_router", "lora.rank=2", "lora does nothing in stage 'router'"),
        ("med_moe_router", "data.packing=true", "data.packing does nothing in stage 'router'"),
        (
            "med_moe_router",
            "evaluation.scorers=[strict]",
            "evaluation.scorers does nothing in stage 'router'",
        ),
    ],
)
def test_a_setting_that_its_stage_would_not_look_at_is_refused(stage, setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(stage, [setting])


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'stage1_align'\?"):
        load_recipe("stage1_aling")


def test_a_recipe_without_stage_is_an_error(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"output_dir": "x"}))
    with pytest.raises(
        ValueError, match=r"has no stage. Choose one of align, tune, router, experts"
    ):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: align\noptim: {epochs: 1}\noptim: {epochs: 2}\n", "'optim' stands twice"),
        ("stage: align\noptim:\n  epochs: 1\n  epochs: 2\n", "'epochs' stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_an_error(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_every_word_of_other_trainers_means_a_key():
    assert set(MEANINGS.values()) <= set(known_keys(Recipe))
    assert not set(MEANINGS) & set(known_keys(Recipe))
