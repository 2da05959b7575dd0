"""Out to LLaVA JSON, JSON lines and parquet and back in: every field of every row comes home."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moellava.data import read_rows
from moellava.data.convert import ImageStore, convert_rows
from moellava.images import exact_hash, load_image
from moellava.storage.locking import locked
from moellava.testing import write_medmnist, write_slake, write_vqa_rad_authors
from moellava.testing.datasets import picture

SUFFIXES = (".json", ".jsonl", ".parquet")
SOURCES = ("vqa_rad", "slake", "pmc_vqa", "authors", "medmnist", "llava")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, dataset_cache):
    folder = tmp_path_factory.mktemp("sources")
    rows = [
        {
            "id": "x",
            "image": ["imgs/xmlab0/source.jpg", "imgs/xmlab1/source.jpg"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Is <image>\nolder than <image>?"},
                {"from": "gpt", "value": "Ja, ein bißchen."},
            ],
            "answer_type": "close",
            "nested": {"a": [1, 2.5, None, "图"]},
        },
        {
            "id": "y",
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."}],
        },
    ]
    slake = write_slake(folder / "slake", zipped=False)
    (slake / "own.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return {
        "vqa_rad": read_rows("flaviagiammarino/vqa-rad", split="train"),
        "slake": read_rows(slake / "train.json"),
        "pmc_vqa": read_rows("RadGenome/PMC-VQA", split="test_2"),
        "authors": read_rows(write_vqa_rad_authors(folder / "rad")),
        "medmnist": read_rows(
            write_medmnist(folder / "a.npz"), split="val", class_names=["a", "b", "c"]
        ),
        "llava": read_rows(slake / "own.json"),
    }


def content(row):
    """A row whose images are replaced by the hash of what they hold."""

    def encoded(image):
        if isinstance(image, np.ndarray):  # an array comes back as a PNG of the same pixels
            return exact_hash(image)
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        opened = Image.open(io.BytesIO(data))
        return exact_hash(np.asarray(opened)) if opened.format == "PNG" else exact_hash(data)

    return replace(row, images=tuple(encoded(image) for image in row.images))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_lost_on_the_way_there_and_back(sources, tmp_path, source, suffix):
    rows = sources[source]
    out = tmp_path / f"out{suffix}"
    assert convert_rows(rows, out) == len(rows)
    again = read_rows(
        out, images=None if isinstance(rows[0].images[0], (bytes, np.ndarray)) else rows.image_root
    )
    assert [content(row) for row in again] == [content(row) for row in rows]
    twice = tmp_path / "twice.json"
    convert_rows(again, twice, images=tmp_path / "twice_images", copy_images=True)
    assert [content(row) for row in read_rows(twice, images=tmp_path / "twice_images")] == [
        content(r) for r in rows
    ]


def test_the_json_is_what_llava_reads(sources, tmp_path):
    convert_rows(sources["slake"], tmp_path / "out.json")
    first = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))[0]
    assert first["image"] == "xmlab0/source.jpg"
    assert first["conversations"] == [
        {"from": "human", "value": "<image>\nIs there evidence of an aortic aneurysm?"},
        {"from": "gpt", "value": "yes"},
    ]
    assert (first["answer_type"], first["modality"], first["source"]) == (
        "CLOSED",
        "X-Ray",
        "slake",
    )


def test_an_image_of_several_rows_is_written_once_beside_the_file(sources, tmp_path):
    convert_rows(sources["vqa_rad"], tmp_path / "out.json")
    assert len(list((tmp_path / "images").iterdir())) == 3
    assert len(sources["vqa_rad"]) == 6
    assert load_image(read_rows(tmp_path / "out.json")[5].images[0]).size == (64, 48)


def test_parquet_opens_in_datasets_with_its_images(sources, tmp_path):
    from datasets import load_dataset

    convert_rows(sources["llava"], tmp_path / "out.parquet")
    table = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")
    assert [image.size for image in table[0]["images"]] == [(64, 48), (64, 48)]
    assert table[1]["images"] == []


def test_errors(sources, tmp_path):
    (tmp_path / "there.json").touch()
    with pytest.raises(FileExistsError, match=r"there\.json is there already"):
        convert_rows(sources["llava"], tmp_path / "there.json")
    with pytest.raises(
        ValueError, match=r"out\.csv: which kind of file\? .* \.json, \.jsonl, \.parquet"
    ):
        convert_rows(sources["llava"], tmp_path / "out.csv")


def test_two_processes_do_not_write_into_one_folder(sources, tmp_path):
    """They would share the names of images that are half written."""
    rows = sources["llava"]
    with locked(tmp_path), pytest.raises(OSError, match=rf"in use by .*pid {os.getpid()} on "):
        convert_rows(rows, tmp_path / "out.json")
    convert_rows(rows, tmp_path / "out.json")
    assert not list(tmp_path.glob("*.lock"))


def test_two_pictures_of_the_same_numbers_are_two_files(tmp_path):
    """A grey image and one whose palette inverts it, as a format of one's own may give them."""
    indices = np.resize(np.arange(256, dtype=np.uint8), (40, 40))
    inverted = Image.fromarray(indices, mode="P")
    inverted.putpalette(np.arange(255, -1, -1, dtype=np.uint8).repeat(3).tobytes())
    pictures = [Image.fromarray(indices), inverted]
    store = ImageStore(tmp_path, tmp_path / "images", copy=False)
    names = [store.name(image) for image in pictures]
    for image, name in zip(pictures, names, strict=True):
        written = load_image(tmp_path / "images" / name)
        assert np.array_equal(np.asarray(written), np.asarray(image.convert("RGB")))


def llava_file(folder: Path, *images: str) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "No."}]
    rows = [{"id": str(n), "image": name, "conversations": turns} for n, name in enumerate(images)]
    (folder / "t.json").write_text(json.dumps(rows))
    return folder / "t.json"


class TestWhatIsPublished:
    """Only images of the image folder."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "set").mkdir()
        (tmp_path / "secret.txt").write_text("password")
        picture(0).save(tmp_path / "elsewhere.png")
        picture(1).save(tmp_path / "set" / "a.png")
        return tmp_path / "set"

    @pytest.mark.parametrize("suffix", [".json", ".parquet"])
    @pytest.mark.parametrize("how", ["relative", "absolute", "link"])
    def test_paths_that_leave_the_image_folder_are_refused(self, folder, tmp_path, how, suffix):
        outside = tmp_path / "elsewhere.png"
        names = {"relative": "../elsewhere.png", "absolute": str(outside), "link": "link.png"}
        (folder / "link.png").symlink_to(outside)
        rows = read_rows(llava_file(folder, "a.png", names[how]), images=folder)
        out = tmp_path / f"out{suffix}"
        with pytest.raises(ValueError, match=r"outside the image folder .* --allow-outside"):
            convert_rows(rows, out, copy_images=True)
        assert not out.exists()
        assert convert_rows(rows, out, copy_images=True, allow_outside=True) == 2

    @pytest.mark.parametrize("suffix", [".json", ".parquet"])
    def test_a_file_that_is_not_an_image_is_refused(self, folder, tmp_path, suffix):
        (folder / "passwd").write_text("root:x:0:0")
        rows = read_rows(llava_file(folder, "passwd"), images=folder)
        with pytest.raises(ValueError, match="passwd cannot be read as an image"):
            convert_rows(rows, tmp_path / f"out{suffix}", copy_images=True)

    def test_copies_never_land_in_the_folder_of_the_originals(self, folder, tmp_path):
        rows = read_rows(llava_file(folder, "a.png"), images=folder)
        with pytest.raises(ValueError, match="the folder of the originals"):
            convert_rows(rows, tmp_path / "out.json", images=folder, copy_images=True)

    def test_another_file_under_an_images_name_is_not_taken_for_it(self, folder, tmp_path):
        (tmp_path / "images").mkdir()
        picture(7).save(tmp_path / "images" / "a.png")
        rows = read_rows(llava_file(folder, "a.png"), images=folder)
        convert_rows(rows, tmp_path / "out.json", copy_images=True)
        (again,) = read_rows(tmp_path / "out.json", images=tmp_path / "images")
        assert exact_hash(again.images[0]) == exact_hash(folder / "a.png")


def test_nifti_survives_parquet(tmp_path):
    import nibabel

    values = np.random.default_rng(0).integers(0, 255, (8, 9, 10), dtype=np.uint8)
    for name in ("a.nii", "b.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / name)
    rows = read_rows(llava_file(tmp_path, "a.nii", "b.nii.gz"), images=tmp_path)
    convert_rows(rows, tmp_path / "out.parquet")
    convert_rows(read_rows(tmp_path / "out.parquet"), tmp_path / "back" / "out.json")
    expected = np.asarray(load_image(tmp_path / "a.nii"))
    for row in read_rows(tmp_path / "back" / "out.json"):
        assert row.images[0].endswith((".nii", ".nii.gz"))
        assert np.array_equal(np.asarray(load_image(row.images[0])), expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_column_with_one_of_our_names_does_not_replace_the_turns(tmp_path, suffix):
    (tmp_path / "t.csv").write_text("image,question,answer,conversations\na.png,Why?,No.,other\n")
    picture(0).save(tmp_path / "a.png")
    rows = read_rows(tmp_path / "t.csv", format="vqa")
    convert_rows(rows, tmp_path / f"out{suffix}")
    (again,) = read_rows(
        tmp_path / f"out{suffix}", images=tmp_path if suffix != ".parquet" else None
    )
    assert (again.answer, again.extra) == ("No.", {"conversations": "other"})
