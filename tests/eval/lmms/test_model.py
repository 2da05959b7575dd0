"""Inside lmms-eval itself, where it is installed; docs/evaluation.md says with which version."""

import json

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks.slake.utils import normalize_answer

from moellava import load_pretrained_model
from moellava.eval.lmms import manifest, tasks_folder
from moellava.eval.lmms.model import MoellavaChat
from moellava.eval.run import evaluate
from moellava.eval.scorers.slake_exact import _normalize
from moellava.eval.settings import EvaluationSettings
from moellava.testing import write_vqa_rad


@pytest.fixture(scope="module")
def local_task(tmp_path_factory):
    """Our VQA-RAD task on a folder of the hub's files, as a user without a network has it."""
    folder = tmp_path_factory.mktemp("tasks")
    data = write_vqa_rad(folder / "vqa-rad")
    text = (
        f"include: {tasks_folder() / 'vqa_rad.yaml'}\ntask: local_vqa_rad\ndataset_path: {data}\n"
    )
    (folder / "local_vqa_rad.yaml").write_text(text)
    return folder


def run(folder, checkpoint, **more):
    return simple_evaluate(
        model="moellava",
        model_args=f"pretrained={checkpoint},dtype=float32",
        tasks=["local_vqa_rad"],
        task_manager=TaskManager("ERROR", include_path=str(folder), model_name="moellava"),
        batch_size=2,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
        **more,
    )


def test_the_entry_point_names_a_chat_model():
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    assert MODEL_REGISTRY_V2.get_model_class("moellava") is MoellavaChat


@pytest.mark.slow
def test_a_task_gives_the_answers_and_scores_of_our_own_evaluation(
    local_task, eval_checkpoint, tmp_path
):
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    found = run(local_task, eval_checkpoint)
    own = evaluate(
        load_pretrained_model(str(eval_checkpoint), dtype="float32"),
        str(local_task / "vqa-rad"),
        tmp_path,
        EvaluationSettings(prompt="short", batch_size=3),
        split="test",
    )
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    samples = found["samples"]["local_vqa_rad"]
    assert [sample["filtered_resps"][0] for sample in samples] == [
        line["answer"].strip() for line in lines
    ]
    averages = found["results"]["local_vqa_rad"]
    for scorer, entry in own["scorers"].items():
        for metric, interval in entry["metrics"].items():
            assert averages[f"{scorer}_{metric},none"] == pytest.approx(interval["value"])


def test_a_task_that_samples_is_refused(local_task, eval_checkpoint):
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    with pytest.raises(ValueError, match=r"temperature=0\.7.*--gen_kwargs temperature=0"):
        run(local_task, eval_checkpoint, gen_kwargs="temperature=0.7", limit=1)


@pytest.mark.parametrize(
    "text",
    ["X-Ray", "(a) b（c）", "Yes.", "正常", "不是。", "left  lung, right", "", "True", "x ray"],
)
def test_slake_exact_normalizes_as_lmms_eval_does(text):
    assert _normalize(text) == normalize_answer(text)
