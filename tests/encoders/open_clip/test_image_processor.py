"""The image processor against open_clip's own transform, on the same images."""

import io

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor

from moellava.encoders import BiomedClipImageProcessor, BiomedClipVisionConfig
from moellava.images import to_eight_bit, to_pil

CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height, width, CHANNELS[mode]), dtype=np.uint8
    )
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def open_clip_transform(image_size=224, **cfg):
    return image_transform_v2(PreprocessCfg(size=image_size, **cfg), is_train=False)


def processor(image_size=224, **cfg) -> BiomedClipImageProcessor:
    return BiomedClipImageProcessor.from_open_clip(cfg, image_size)


def pixel_values(images, of=None, **options) -> torch.Tensor:
    return (of or processor())(images, return_tensors="pt", **options)["pixel_values"]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from(sorted(CHANNELS)),
    st.sampled_from([224, 32, 97]),
    st.integers(0, 9),
)
def test_pixels_equal_open_clip_bit_for_bit(width, height, mode, image_size, seed):
    image = random_image(width, height, mode, seed)
    expected = open_clip_transform(image_size)(image)
    assert torch.equal(pixel_values(image, processor(image_size))[0], expected)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 500), (500, 1), (517, 223), (224, 224), (225, 225), (3000, 2000)]
)
@pytest.mark.parametrize("mode", sorted(CHANNELS))
def test_extreme_sizes_equal_open_clip_bit_for_bit(size, mode):
    image = random_image(*size, mode)
    assert torch.equal(pixel_values(image)[0], open_clip_transform()(image))


def test_transformers_clip_processor_is_not_open_clips_transform():
    image = random_image(517, 223)
    theirs = CLIPImageProcessor()(image, return_tensors="pt")["pixel_values"][0]
    assert not torch.allclose(theirs, open_clip_transform()(image), atol=1e-3)


@pytest.mark.parametrize("image_size", [224, (160, 224), (224, 96)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_open_clip_setting_gives_open_clips_pixels(image_size, resize_mode, interpolation):
    cfg = {
        "resize_mode": resize_mode,
        "interpolation": interpolation,
        "fill_color": 37,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.5, 0.25, 0.2),
    }
    for width, height in ((300, 200), (131, 377), (224, 224), (20, 31)):
        image = random_image(width, height)
        expected = open_clip_transform(image_size, **cfg)(image)
        assert torch.equal(pixel_values(image, processor(image_size, **cfg))[0], expected)


def test_batch_equals_its_images_one_by_one():
    images = [
        random_image(50 + 37 * i, 300 - 29 * i, mode) for i, mode in enumerate(sorted(CHANNELS) * 2)
    ]
    batch = pixel_values(images)
    assert batch.shape == (10, 3, 224, 224)
    for row, image in zip(batch, images, strict=True):
        assert torch.equal(row, open_clip_transform()(image))


def test_sixteen_bit_grey_is_scaled_by_its_range_not_clamped():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = Image.fromarray(values)
    assert image.mode.startswith("I;16")
    eight = np.asarray(to_eight_bit(image))
    assert np.array_equal(eight, np.rint(values / 65535 * 255).astype(np.uint8))
    assert (
        np.asarray(image.convert("RGB"))[..., 0].mean() > 200
    )  # what Pillow does: everything above 255 is white
    assert torch.equal(pixel_values(image), pixel_values(Image.fromarray(eight)))
    assert torch.equal(pixel_values(values), pixel_values(image))


def test_same_grey_value_is_the_same_in_dark_and_bright_images():
    dark, bright = np.full((8, 8), 1000, np.uint16), np.full((8, 8), 1000, np.uint16)
    bright[0, 0] = 65535
    a, b = (np.asarray(to_eight_bit(Image.fromarray(array))) for array in (dark, bright))
    assert a[4, 4] == b[4, 4] == 4


def test_palette_images_are_resized_as_colours():
    rgb = random_image(300, 260)
    palette = rgb.quantize(32)
    assert palette.mode == "P"
    assert torch.equal(pixel_values(palette)[0], open_clip_transform()(palette.convert("RGB")))


def test_bilevel_images_are_resized_as_grey():
    bilevel = random_image(300, 260, "L").convert("1")
    assert torch.equal(pixel_values(bilevel)[0], open_clip_transform()(bilevel.convert("L")))


def test_thirty_two_bit_values_beyond_sixteen_bits_are_refused():
    image = Image.fromarray(np.full((4, 4), 70000, np.int32))
    with pytest.raises(ValueError, match=r"70000 to 70000; expected 16 bits.*window"):
        pixel_values(image)


@pytest.mark.parametrize("kind", ["uint8", "channels_first", "float", "tensor", "tensor_float"])
def test_arrays_and_tensors_equal_the_pil_image(kind):
    image = random_image(70, 50)
    array = np.asarray(image)
    given = {
        "uint8": array,
        "channels_first": array.transpose(2, 0, 1),
        "float": array / 255,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "tensor_float": torch.from_numpy(array / 255).float(),
    }[kind]
    assert torch.equal(pixel_values(given), pixel_values(image))


def test_grey_arrays_equal_the_grey_pil_image():
    image = random_image(70, 50, "L")
    array = np.asarray(image)
    for form in (array, array[None], array[..., None], array[None, ..., None], [array]):
        assert torch.equal(pixel_values(form), pixel_values(image))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5), np.uint8), r"shape \(0, 5\)"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \(5, 5, 2\); expected \(H, W\)"),
        (np.full((5, 5), 7.0), "values 7 to 7; expected 0 to 1"),
        (np.full((5, 5), np.nan), "expected 0 to 1"),
        (np.zeros((5, 5), np.int64), "dtype int64; expected uint8, uint16, or float"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        pixel_values(array)


def test_unreadable_files_are_named(tmp_path):
    broken = tmp_path / "chest.png"
    buffer = io.BytesIO()
    random_image(64, 64).save(buffer, "PNG")
    for content in (b"", b"not an image", buffer.getvalue()[:300]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"chest\.png cannot be read as an image"):
            to_pil(broken)
    with pytest.raises(FileNotFoundError, match=r"no_such\.png does not exist"):
        pixel_values(str(tmp_path / "no_such.png"))
    with pytest.raises(TypeError, match="Cannot read an image from a dict"):
        to_pil({})


def test_a_path_equals_the_image_in_it(tmp_path):
    image = random_image(90, 40)
    image.save(tmp_path / "a.png")
    assert torch.equal(pixel_values(tmp_path / "a.png"), pixel_values(image))
    assert torch.equal(pixel_values([str(tmp_path / "a.png")]), pixel_values(image))


def test_llava_style_code_finds_what_it_reads():
    of = processor(336)
    assert of.image_mean == tuple(open_clip.OPENAI_DATASET_MEAN)
    assert of.image_std == tuple(open_clip.OPENAI_DATASET_STD)
    assert (of.crop_size["height"], of.crop_size["width"]) == (336, 336)
    assert of.size["shortest_edge"] == 336
    pixels = of.preprocess(random_image(40, 60), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 336, 336)
    assert of.preprocess(random_image(40, 60))["pixel_values"][0].shape == (3, 336, 336)


def test_switches_do_what_they_say():
    image = random_image(300, 200)
    raw = pixel_values(image, do_normalize=False, do_rescale=False)
    assert raw.min() == 0
    assert raw.max() > 200
    assert pixel_values(image, do_center_crop=False).shape == (1, 3, 224, 336)
    assert pixel_values(image, do_center_crop=False, do_resize=False).shape == (1, 3, 200, 300)
    with pytest.raises(ValueError, match="do_convert_rgb=False"):
        pixel_values(image, do_convert_rgb=False)
    with pytest.raises(ValueError, match="do_pad"):
        pixel_values(image, do_pad=True)


def test_images_of_several_sizes_without_crop_cannot_be_stacked_but_can_be_listed():
    images = [random_image(300, 200), random_image(200, 200), random_image(300, 200, seed=1)]
    values = processor()(images, do_center_crop=False)["pixel_values"]
    assert [value.shape for value in values] == [(3, 224, 336), (3, 224, 224), (3, 224, 336)]


def test_saved_processor_reloads_as_itself_through_auto_class(tmp_path):
    image = random_image(517, 223)
    of = processor((160, 224), resize_mode="longest", fill_color=9)
    of.save_pretrained(tmp_path)
    BiomedClipVisionConfig().save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is BiomedClipImageProcessor
    assert again.to_dict() == of.to_dict()
    assert torch.equal(pixel_values(image, again), pixel_values(image, of))


def test_unknown_settings_list_the_known_ones():
    with pytest.raises(
        ValueError, match="resize_mode is 'stretch'; choose one of shortest, longest, squash"
    ):
        processor(resize_mode="stretch")
    with pytest.raises(ValueError, match=r"interpolation 'cubic'; known: bicubic, bilinear"):
        processor(interpolation="cubic")


def test_a_saved_processor_opens_by_its_auto_class_without_a_word_about_torchvision(
    tmp_path, caplog, monkeypatch
):
    from transformers.utils import logging

    BiomedClipImageProcessor.from_open_clip({}, 224).save_pretrained(tmp_path)
    logger = logging.get_logger("transformers")
    logger.warning_once.cache_clear()  # what was said once in this process is not said again
    monkeypatch.setattr(logger, "propagate", True)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is BiomedClipImageProcessor
    assert caplog.messages == []
