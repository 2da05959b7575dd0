"""Rows whose images stand for several pictures: read, trained on, evaluated, checked, converted."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.data import RowError, check_rows, read_rows
from moellava.data.convert import convert_rows
from moellava.encoders import create_encoder
from moellava.encoders.batches import encode_images
from moellava.eval.evaluation_data import read_evaluation_data
from moellava.images import image_key, load_image, to_pil
from moellava.model.turns import with_images
from moellava.train.batches import row_lengths
from moellava.train.features import encode_rows
from moellava.train.usable_rows import usable_rows
from tests.images.conftest import write_ct


def written(folder, image, text="<image>\nWhat is it?"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A liver."}]
    path = folder / "rows.json"
    path.write_text(json.dumps([{"id": "a", "image": image, "conversations": turns}]))
    return read_rows(path)


@pytest.fixture
def folder(tmp_path):
    volume = np.random.default_rng(0).integers(0, 3000, (12, 9, 11)).astype(np.int16)
    write_ct(tmp_path / "ct", volume)
    Image.new("L", (9, 9)).save(tmp_path / "flat.png")
    return tmp_path


def test_each_mark_becomes_the_marks_of_its_parts(folder):
    images = ["flat.png", {"path": "ct", "slices": 2, "window": "lung"}]
    (row,) = written(folder, images, "First <image>\nthen <image>\nWhat is it?")
    assert row.turns[0].text == (
        "First <image>\nthen slice 1 of 2, axial: <image>\nslice 2 of 2, axial: <image>\n"
        "What is it?"
    )
    assert row.images[0] == str(folder / "flat.png")
    assert [to_pil(part).size for part in row.images[1:]] == [(11, 9)] * 2
    assert len({image_key(image) for image in row.images}) == 3


def test_the_model_is_trained_on_the_prompt_that_it_is_asked_with(folder, collator):
    (row,) = written(folder, {"path": "ct", "slices": 3})
    messages, pictures = with_images("What is it?", [folder / "ct"], {"slices": 3})
    processor = collator.processor
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, images=pictures, return_tensors="pt")
    batch = collator([row])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], inputs["input_ids"])
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    assert row_lengths([row], collator) == [batch["input_ids"].shape[1]]
    item = {"type": "image", "image": str(folder / "ct"), "slices": 3}
    content = [item, {"type": "text", "text": "What is it?"}]
    reply = {"role": "assistant", "content": "A liver."}
    bare = collator([{"messages": [{"role": "user", "content": content}, reply]}])
    assert torch.equal(bare["input_ids"], batch["input_ids"])
    assert torch.equal(bare["pixel_values"], batch["pixel_values"])


def test_parts_have_names_in_an_evaluation(folder):
    written(folder, {"path": "ct", "slices": 2, "window": "lung"})
    data = read_evaluation_data(folder / "rows.json")
    (question,) = data.questions
    names = ("ct/021.dcm#window=lung", "ct/063.dcm#window=lung")
    assert question.image_names == names
    for name in names:
        file = folder / name.partition("#")[0]
        assert np.array_equal(data.load(name), load_image(file, window="lung"))


def test_they_are_checked_and_converted(folder):
    rows = written(folder, {"path": "ct", "slices": 2})
    report = check_rows(rows)
    assert (report.num_images, report.problems) == (2, [])
    assert usable_rows(rows, "data.train", skip_bad=False, show_progress=False) is rows
    convert_rows(rows, folder / "out" / "rows.json")
    (again,) = read_rows(folder / "out" / "rows.json")
    assert again.turns == rows[0].turns
    for png, part in zip(again.images, rows[0].images, strict=True):
        assert str(png).endswith(".png")
        assert np.array_equal(to_pil(png), to_pil(part))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"path": "ct", "slices": 13}, "row 0 .*the series has 12 in the range, and num is 13"),
        ({"path": "ct", "slcies": 3}, "row 0 .*Unknown key of an image 'slcies'.*'slices'"),
        ({"path": "gone", "slices": 3}, "row 0 .*The image .*gone does not exist"),
        ({"slices": 3}, "row 0 .*an image is empty"),
        ({"path": "flat.png", "slices": 3}, "row 0 .*flat.png is not a volume"),
    ],
)
def test_what_a_row_asks_for_in_vain_names_the_row(folder, image, message):
    with pytest.raises(RowError, match=message):
        written(folder, image)


def test_kept_features_hold_each_part_once(folder, small_biomedclip, tmp_path):
    (row,) = written(folder, {"path": "ct", "slices": 2, "window": "lung"})
    tower = create_encoder("biomedclip", str(small_biomedclip))
    path = tmp_path / "features.safetensors"
    kept = encode_rows(tower, [row, row], path, dtype=torch.float32, autocast=False, progress=False)
    assert kept.file.names == [image_key(part) for part in row.images]
    for part in row.images:
        alone = encode_images(tower, [load_image(part.source, window="lung")])[0]
        assert torch.allclose(kept(part).tokens[0], alone.float(), atol=1e-5)
