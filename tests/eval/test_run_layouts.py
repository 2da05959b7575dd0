"""Each published layout through `moellava eval`: questions, types, options, groups, contract."""

import pytest
from typer.testing import CliRunner

from moellava.cli import app
from moellava.testing import (
    write_medmnist,
    write_omnimedvqa,
    write_pmc_vqa,
    write_slake,
    write_vqa_rad_authors,
)
from tests.eval.contract import read_and_check


@pytest.fixture
def evaluated(eval_checkpoint, tmp_path):
    """`moellava eval CHECKPOINT DATA` as typed; the checked lines and scores."""

    def evaluated(data, *options):
        out = tmp_path / "results"
        done = CliRunner().invoke(
            app,
            ["eval", str(eval_checkpoint), str(data), "--out", str(out), "--max-new-tokens", "2",
             "--device", "cpu", "--resamples", "20", *options],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        return read_and_check(out)

    return evaluated


def told(lines, *names):
    return [tuple(line[name] for name in names) for line in lines]


def test_vqa_rad_as_its_authors_have_it(evaluated, tmp_path):
    data = write_vqa_rad_authors(tmp_path / "rad")
    lines, scores = evaluated(data, "--split", "test", "--group-by", "image_organ")
    assert told(lines, "id", "truth", "answer_type", "answer_type_from") == [
        ("2", "No", "closed", "data"), ("5", "3", "open", "data"),
    ]  # fmt: skip
    assert lines[0]["images"] == ["synpic1.jpg"]
    assert scores["groups"].keys() == {"image_organ"}


@pytest.mark.parametrize(("language", "truths"), [("en", ["yes"]), ("zh", ["肺"])])
def test_slake_in_either_language(evaluated, tmp_path, language, truths):
    data = write_slake(tmp_path / "slake", zipped=False)
    lines, scores = evaluated(data, "--split", "test", "--language", language)
    assert [line["truth"] for line in lines] == truths
    assert lines[0]["groups"] == {
        "modality": "X-Ray", "location": "Lung", "content_type": "Organ", "q_lang": language,
    }  # fmt: skip
    assert scores["groups"]["content_type"].keys() == {"Organ"}


@pytest.mark.parametrize("name", ["flaviagiammarino/vqa-rad", "flaviagiammarino/path-vqa"])
def test_sets_of_the_hub_without_answer_types(evaluated, dataset_cache, name):
    lines, scores = evaluated(name, "--split", "test")
    assert told(lines, "truth", "answer_type", "answer_type_from") == [
        ("yes", "closed", "truth is yes or no"),
        ("lung", "open", "truth is neither yes nor no"),
        ("no", "closed", "truth is yes or no"),
    ]
    assert lines[0]["images"] == lines[1]["images"] or "path" in name  # CMYK is another file
    assert scores["answer_types"]["closed"] == {"truth is yes or no": 2}


@pytest.mark.parametrize(("split", "truth"), [("test", "C"), ("test_2", "B")])
def test_both_versions_of_pmc_vqa(evaluated, tmp_path, split, truth):
    folder = write_pmc_vqa(tmp_path / "pmc", zipped=False)
    lines, scores = evaluated(folder / f"{split}.csv")
    assert {line["truth"] for line in lines} == {truth}
    assert told(lines, "answer_type", "answer_type_from", "options") == [
        ("choice", "options", ["CT", "MRI", "None", "X-ray"])
    ] * len(lines)
    assert lines[0]["probabilities"].keys() == set("ABCD")
    assert scores["scorers"]["mcq"]["metrics"]["choice_accuracy"]["n"] == len(lines)


def test_omnimedvqa_with_its_groups(evaluated, tmp_path):
    root = write_omnimedvqa(tmp_path / "OmniMedVQA")
    lines, scores = evaluated(root / "QA_information" / "Open-access" / "CASE.json")
    assert told(lines, "answer_type", "options")[1] == ("choice", ["No", "Yes"])
    assert scores["groups"]["dataset"].keys() == {"CASE"}
    assert scores["groups"]["modality_type"].keys() == {"MR (Mag-netic Resonance Imaging)"}
    kinds = scores["groups"]["question_type"]
    assert kinds.keys() == {"Modality Recognition", "Disease Diagnosis"}
    assert kinds["Disease Diagnosis"]["scorers"]["mcq"]["metrics"]["choice_accuracy"]["n"] == 2
    assert scores["num_images"] == 2


def test_arrays_of_medmnist(evaluated, tmp_path):
    path = write_medmnist(tmp_path / "my.npz")
    lines, scores = evaluated(
        path, "--split", "test", "--class-names", "adipose,debris,mucus", "--train", str(path),
        "--train-split", "train", "--baselines", "most_frequent",
    )  # fmt: skip
    assert told(lines, "truth", "options")[1] == ("debris", ["adipose", "debris", "mucus"])
    assert {line["answer_type"] for line in lines} == {"choice"}
    assert all(line["images"][0].startswith("sha256:") for line in lines)
    assert scores["most_frequent_from"] == "the training split"


def test_llava_json_of_several_turns(evaluated, eval_folder):
    lines, scores = evaluated(
        eval_folder / "questions.json", "--images", str(eval_folder / "images")
    )
    assert told(lines, "id", "question", "truth")[-2:] == [
        ("text", "What does CT mean?", "computed tomography"),
        ("text#2", "Is it an X-ray method?", "yes"),
    ]
    assert scores["num_images_seen"] == 28
