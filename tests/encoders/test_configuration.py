"""The fields of an encoder's config, and those that a user may choose."""

import pytest

from moellava.encoders import (
    BiomedClipVisionConfig,
    ClipVisionConfig,
    VisionEncoderConfig,
    encoder_options,
    option,
)
from moellava.encoders.configuration import check_options, image_height_width
from moellava.encoders.factory import ENCODERS

COMMON = ["image_size", "patch_tokens", "select_layer", "select_feature", "final_norm"]


class ToyConfig(VisionEncoderConfig):
    """A family with an option of its own, and another default for one that all have."""

    model_type = "toy_of_test_configuration"

    image_size: int = 40
    num_rays: int = option(3, "How many rays.")
    measured: int | None = None


def test_options_are_the_marked_fields_a_familys_own_included():
    assert list(encoder_options(ClipVisionConfig)) == COMMON
    assert list(encoder_options(ToyConfig)) == [*COMMON, "num_rays"]
    options = encoder_options(ToyConfig)
    assert (options["num_rays"].default, options["num_rays"].type) == (3, int)
    assert options["num_rays"].metadata["help"] == "How many rays."
    assert options["image_size"].default == 40


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_every_option_of_every_family_is_explained_and_found_without_naming_one(kind):
    options = encoder_options(kind.encoder_class().config_class)
    assert set(COMMON) <= set(options) <= set(encoder_options())
    for field in encoder_options().values():
        assert field.metadata["help"].endswith(".")
        assert not isinstance(field.type, str)


def test_a_chosen_option_reaches_the_config_and_its_json():
    config = ToyConfig(num_rays=5, select_layer=(-1, -2))
    again = ToyConfig.from_dict(config.to_dict())
    assert (again.num_rays, again.select_layer) == (5, [-1, -2])


def test_llavas_default_is_patch():
    assert VisionEncoderConfig(select_feature="default").select_feature == "patch"
    assert BiomedClipVisionConfig.from_dict({"select_feature": "default"}).select_feature == "patch"


def test_trained_size_is_the_size_if_none_is_given():
    assert BiomedClipVisionConfig(vision_cfg={"image_size": 64}).image_size == 64
    assert BiomedClipVisionConfig(vision_cfg={"image_size": [64, 32]}).image_hw == (64, 32)
    assert VisionEncoderConfig().image_size == 224


@pytest.mark.parametrize("bad", [0, -16, [224, 0], [1, 2, 3], []])
def test_sizes_that_are_not_one_or_two_positive_sides_are_refused(bad):
    with pytest.raises(ValueError, match=r"image_size is .*; give"):
        image_height_width(bad)
    with pytest.raises(ValueError, match=r"image_size is .*; give"):
        VisionEncoderConfig(image_size=bad)


def test_unknown_names_suggest_the_nearest_and_list_the_options():
    with pytest.raises(TypeError, match=r"ToyConfig has no option 'num_ray'\. .*'num_rays'\?"):
        check_options(ToyConfig, {"num_ray": 1})
    with pytest.raises(TypeError, match=r"Known: image_size, .*, final_norm, num_rays\."):
        check_options(ToyConfig, {"zzz": 1})
    check_options(ToyConfig, {"measured": 1})
    with pytest.raises(TypeError, match="no option 'measured'"):
        check_options(ToyConfig, {"measured": 1}, encoder_options(ToyConfig))
