"""The file for ms-swift, in an environment that has it; docs/other_trainers.md has the versions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moellava.integrations import integration_file
from tests.integrations.model import expected, write_model

pytest.importorskip("swift")


@pytest.mark.slow
def test_one_step_of_lora_and_an_answer(tmp_path):
    model, rows = write_model(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    command = Path(sys.executable).with_name("swift")
    plugin = ["--external_plugins", str(integration_file("ms-swift"))]
    train = [
        "sft", *plugin, "--model", str(model), "--dataset", str(data), "--tuner_type", "lora",
        "--max_steps", "1", "--torch_dtype", "float32", "--output_dir", str(tmp_path / "out"),
        "--report_to", "none", "--split_dataset_ratio", "0", "--dataloader_num_workers", "0",
    ]  # fmt: skip
    subprocess.run([str(command), *train], check=True, timeout=300)
    [adapter] = (tmp_path / "out").glob("*/checkpoint-1")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({**rows[0], "messages": rows[0]["messages"][:1]}) + "\n")
    infer = [
        "infer", *plugin, "--adapters", str(adapter), "--val_dataset", str(asked),
        "--max_new_tokens", "5", "--result_path", str(tmp_path / "result.jsonl"),
    ]  # fmt: skip
    subprocess.run([str(command), *infer], check=True, timeout=300)
    assert json.loads((tmp_path / "result.jsonl").read_text())["response"]


@pytest.mark.slow
def test_prompts_and_labels_are_our_collators(tmp_path):
    from swift.model import get_processor
    from swift.template import get_template
    from swift.utils import import_external_file

    model, rows = write_model(tmp_path)
    import_external_file(str(integration_file("ms-swift")))
    template = get_template(get_processor(str(model)))
    for row in rows:
        ids, labels = expected(model, row)
        template.set_mode("train")
        encoded = template.encode(row)
        assert (encoded["input_ids"], encoded["labels"]) == (ids, labels)
        template.set_mode("transformers")
        prompt = template.encode({**row, "messages": row["messages"][:1]})["input_ids"]
        assert prompt == ids[: len(prompt)]
        assert labels[len(prompt)] != -100
