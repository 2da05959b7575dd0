"""The demo's files are read by the library's own reader."""

import pytest

from moellava.data import read_rows
from moellava.demo.dataset import write_dataset
from moellava.demo.images import MODALITIES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("data"), num_train_crops=2, num_held_out_crops=1, seed=0
    )


def test_every_file_is_read_as_llavas(files):
    images = files["train"].with_name("images")
    counts = {name: len(read_rows(path, images=images)) for name, path in files.items()}
    crops = 2 * len(MODALITIES)
    assert counts == {
        "captions": crops,
        "conversations": crops,
        "descriptions": 4 * crops,
        "train": 3 * crops,
        "held_out": 3 * len(MODALITIES),
    }


def test_questions_name_modality_and_picture_and_a_conversation_has_them_all(files):
    images = files["train"].with_name("images")
    questions = read_rows(files["train"], images=images)
    assert [row.extra["modality"] for row in questions[::6]] == list(MODALITIES)
    assert all(row.extra["picture"] for row in questions)
    for row in read_rows(files["conversations"], images=images):
        answers = [turn.text for turn in row.turns if turn.role == "assistant"]
        assert len(answers) == 3
        assert {"yes", "no"} < set(answers)


def test_the_same_seed_writes_the_same_files(files, tmp_path):
    again = write_dataset(tmp_path, num_train_crops=2, num_held_out_crops=1, seed=0)
    assert all(files[name].read_bytes() == again[name].read_bytes() for name in files)
