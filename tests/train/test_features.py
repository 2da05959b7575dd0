"""Features of a frozen tower are kept, and refused if they are of another."""

import pytest
import torch

from moellava.encoders import create_encoder
from moellava.encoders.feature_file import encode_files
from moellava.testing.datasets import picture
from moellava.train import train
from moellava.train.features import ImageFeatures
from tests.train.tiny import losses, parts_of, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_kept_features_give_the_losses_of_encoding_each_time(tiny, tmp_path):
    recipes = [
        tiny_recipe(tiny, "align", tmp_path / name, *more)
        for name, more in (("each", ()), ("kept", (f"data.features={tmp_path / 'f.safetensors'}",)))
    ]
    each, kept = (train(recipe, show_progress=False) for recipe in recipes)
    assert losses(kept) == pytest.approx(losses(each), rel=1e-5)
    # A second run reads the file; with another tower, the file is refused.
    again = tiny_recipe(
        tiny, "align", tmp_path / "again", f"data.features={tmp_path / 'f.safetensors'}"
    )
    assert losses(train(again, show_progress=False)) == losses(kept)
    other = {**parts_of(tiny), "vision_feature_layer": -1}
    recipe = tiny_recipe(
        tiny,
        "align",
        tmp_path / "other",
        f"data.features={tmp_path / 'f.safetensors'}",
        model=other,
    )
    with pytest.raises(ValueError, match="holds features of select_layer=-2, but the model has -1"):
        train(recipe, show_progress=False)
    tuned = tiny_recipe(
        tiny, "tune", tmp_path / "tower", "optim.max_steps=2", trainable=["vision_tower"]
    )
    train(tuned, show_progress=False)
    settings = (f"data.features={tmp_path / 'f.safetensors'}", "after=any")
    recipe = tiny_recipe(
        tiny, "align", tmp_path / "other", *settings, start_from=str(tmp_path / "tower")
    )
    with pytest.raises(ValueError, match="features of a tower with other weights than the model's"):
        train(recipe, show_progress=False)


@pytest.mark.parametrize(
    ("projector", "merge"), [("pixel_shuffle", "flat"), ("perceiver", "joint")]
)
def test_each_view_of_a_tiled_image_is_kept_once(tiny, tmp_path, projector, merge):
    model = {**parts_of(tiny), "projector_type": projector}
    tiling = {"max_tiles": 4, "merge": merge}
    file = tmp_path / "f.safetensors"
    recipes = [
        tiny_recipe(tiny, "align", tmp_path / name, *more, model={**model, "tiling": tiling})
        for name, more in (("each", ()), ("kept", (f"data.features={file}",)))
    ]
    each, kept = (train(recipe, show_progress=False) for recipe in recipes)
    assert losses(kept) == pytest.approx(losses(each), rel=1e-5)
    kept_file = ImageFeatures(file).file
    names = kept_file.names
    assert len(names) == len(set(names)) == 15 * 5  # 40 x 40 pixels: 2 x 2 tiles of 32, and all
    assert {name.rpartition("#")[2] for name in names} == {f"view={n},40x40" for n in range(5)}
    num_bytes = kept_file.tokens(names[0]).nbytes * len(names)
    assert 0 < file.stat().st_size - num_bytes < 8192 + 2 * len(str(names))
    for other, found in ({**tiling, "max_tiles": 2}, '"max_tiles": 2'), (None, "null"):
        recipe = tiny_recipe(
            tiny,
            "align",
            tmp_path / f"other{found[-1]}",
            f"data.features={file}",
            model={**model, "tiling": other} if other else parts_of(tiny),
        )
        with pytest.raises(ValueError, match=f"holds features with tiling=.* but .*{found}"):
            train(recipe, show_progress=False)


def test_training_in_float32_refuses_features_that_were_computed_in_bfloat16(
    small_biomedclip, tmp_path
):
    encoder = create_encoder("biomedclip", small_biomedclip)
    out = tmp_path / "f.safetensors"
    options = {"precision": "bfloat16", "dtype": torch.float32}
    encode_files(encoder, [picture(0)], ["a"], out, **options)
    features = ImageFeatures(out)
    features.require(encoder, ["a"], torch.bfloat16)
    with pytest.raises(ValueError, match=r"computed in bfloat16, but optim\.precision is fp32"):
        features.require(encoder, ["a"], torch.float32)
