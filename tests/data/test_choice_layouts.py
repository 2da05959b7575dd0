"""Multiple-choice sets whose files are not on the hub as they are read; PMC-VQA is in
`test_readers.py`.
"""

import json

import pytest

from moellava.data import RowError, Turn, read_rows
from moellava.images import load_image
from moellava.testing import write_omnimedvqa

FOLDER = "QA_information/Open-access"


def test_omnimedvqa_as_it_unpacks(tmp_path):
    root = write_omnimedvqa(tmp_path / "OmniMedVQA")
    rows = read_rows(root / FOLDER / "CASE.json")
    assert rows.format == "omnimedvqa"
    four, two = rows[0], rows[1]
    question = (
        "<image>\nWhat modality is shown?\nAnswer with one of these options:\n"
        "CT\nMRI\nUltrasound\nX-ray"
    )
    assert four.turns == (Turn("user", question), Turn("assistant", "MRI"))
    assert (four.id, four.choices) == ("CASE_0000", ("CT", "MRI", "Ultrasound", "X-ray"))
    assert (two.choices, two.answer) == (("No", "Yes"), "Yes")
    assert four.extra == {
        "dataset": "CASE",
        "question_type": "Modality Recognition",
        "modality_type": "MR (Mag-netic Resonance Imaging)",
    }
    assert load_image(four.images[0]).size == (64, 48)
    assert read_rows(root / FOLDER, split="CASE")[0].turns == four.turns


def test_a_question_without_options_is_named(tmp_path):
    root = write_omnimedvqa(tmp_path / "OmniMedVQA")
    path = root / FOLDER / "CASE.json"
    rows = json.loads(path.read_text())
    del rows[1]["option_B"]
    path.write_text(json.dumps(rows))
    with pytest.raises(RowError, match=r"CASE\.json, row 1 \(id 'CASE_0001'\): it has 1 options"):
        read_rows(path)
