"""The tasks without lmms-eval: what they ask, and that their metrics are those of the rules."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

from moellava.data import read_rows
from moellava.data.convert import convert_rows
from moellava.eval.lmms import tasks_folder
from moellava.eval.lmms.documents import (
    SCORERS,
    doc_to_target,
    doc_to_text,
    doc_to_visual,
    process_results,
)
from moellava.eval.scorers import find_scorers
from moellava.testing import write_omnimedvqa, write_pmc_vqa
from moellava.testing.datasets import picture

VQA = {"image": picture(0), "question": "Is it a CT?", "answer": "yes"}
SHORT = {"pre_prompt": "", "post_prompt": "\nIn one word."}


def task(name):
    """A task file as lmms-eval reads it, its functions as their names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    read = yaml.load((tasks_folder() / name).read_text("utf-8"), Loader)
    if "include" in read:
        return task(read.pop("include")) | read
    return read


def converted(rows, path):
    """A record of the parquet that `moellava data convert` writes, as `datasets` gives it."""
    from datasets import load_dataset

    convert_rows(rows, path)
    return load_dataset("parquet", data_files=str(path), split="train")[0]


def test_columns_of_the_hub():
    assert doc_to_text(VQA, SHORT) == "Is it a CT?\nIn one word."
    assert doc_to_target(VQA) == "yes"
    assert [image.size for image in doc_to_visual(VQA)] == [(64, 48)]


def test_a_record_without_its_image_is_scored_as_evaluation_does():
    record = {name: value for name, value in VQA.items() if name != "image"}
    scored = process_results(record, ["Yes, it is"])
    expected = {
        f"{scorer.name}_{metric}": value
        for scorer in find_scorers(SCORERS)
        for metric, value in scorer.score(
            "Yes, it is", "yes", answer_type="closed", options=()
        ).items()
    }
    assert scored == expected
    assert scored["slake_exact_closed_accuracy"] == 0.0 < scored["strict_closed_accuracy"]


@pytest.mark.parametrize(
    ("write", "place", "split", "truth", "last"),
    [
        (write_omnimedvqa, "QA_information/Open-access/CASE.json", None, "MRI", "X-ray"),
        (write_pmc_vqa, "test_2.csv", None, "B", "choices directly."),
    ],
)
def test_converted_sets_of_choices(tmp_path, write, place, split, truth, last):
    folder = write(tmp_path / "set")
    record = converted(read_rows(folder / place, split=split), tmp_path / "set.parquet")
    assert doc_to_text(record).endswith(last)
    assert "<image>" not in doc_to_text(record)
    assert doc_to_target(record) == truth
    assert len(doc_to_visual(record)) == 1
    scored = process_results(record, ["B"])
    assert scored["mcq_choice_accuracy"] == scored["medevalkit_choice_accuracy"] == 1.0


def test_the_tasks_average_every_metric_of_their_rules():
    found = set()
    for truth, options in (("yes", None), ("lung", None), ("lung", ["lung", "heart"])):
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": truth}]
        record = {"id": "1", "conversations": turns, "choices": options}
        found |= process_results(record, ["a lung"]).keys()
    listed = task("_default_template_yaml")["metric_list"]
    assert {metric["metric"] for metric in listed} == found


def test_every_task_names_functions_that_exist_and_a_name_that_lmms_eval_lacks():
    files = sorted(path.name for path in tasks_folder().glob("*.yaml"))
    assert files == ["omnimedvqa.yaml", "path_vqa.yaml", "pmc_vqa.yaml", "vqa_rad.yaml"]
    for name in files:
        read = task(name)
        # A task of lmms-eval's own wins over one of the same name in --include_path.
        assert read["task"] == f"moellava_{name.removesuffix('.yaml')}"
        assert read["output_type"] == "generate_until"
        for key in ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results"):
            module, _, function = read[key].rpartition(".")
            assert callable(getattr(sys.modules[module], function))


def test_the_wheel_has_the_tasks_and_the_entry_point(tmp_path):
    [built] = WheelBuilder(str(Path(__file__).parents[3])).build(directory=str(tmp_path))
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
        points = next(name for name in names if name.endswith("entry_points.txt"))
        assert re.search(
            r"\[lmms_eval\.models\]\nmoellava = moellava\.eval\.lmms:manifest",
            wheel.read(points).decode(),
        )
    packed = {Path(name).name for name in names if name.startswith("moellava/eval/lmms/tasks/")}
    assert packed == {path.name for path in tasks_folder().iterdir() if path.is_file()}


def test_the_command_prints_the_folder_without_torch():
    code = (
        "import sys\nfrom moellava.cli import app\n"
        "try:\n    app(['eval', 'lmms-tasks'])\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tasks_folder()), "False"]
