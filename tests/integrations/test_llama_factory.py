"""The file for LLaMA-Factory, where that is installed; versions: docs/other_trainers.md."""

import json
import os
import runpy
import subprocess
import sys

import pytest

from moellava.integrations import integration_file
from tests.integrations.model import expected, write_model

pytest.importorskip("llamafactory")


@pytest.mark.slow
def test_one_step_of_lora_an_answer_and_our_collators_labels(tmp_path, monkeypatch):
    model, rows = write_model(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant"}  # fmt: skip
    columns = {"messages": "messages", "images": "images"}
    info = {"file_name": str(tmp_path / "rows.json"), "formatting": "sharegpt",
            "columns": columns, "tags": tags}  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": info}))
    settings = {
        "model_name_or_path": model, "template": "moellava", "stage": "sft", "do_train": "true",
        "finetuning_type": "lora", "dataset_dir": tmp_path, "dataset": "rows",
        "output_dir": tmp_path / "out", "max_steps": 1, "report_to": "none",
        "disable_gradient_checkpointing": "true",
    }  # fmt: skip
    file = str(integration_file("llama-factory"))
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1"}
    subprocess.run([sys.executable, file, "train", *words], check=True, env=environment)

    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    runpy.run_path(file, run_name="registered")
    from llamafactory.chat import ChatModel

    chat = ChatModel(
        {
            "model_name_or_path": str(model),
            "adapter_name_or_path": str(tmp_path / "out"),
            "template": "moellava",
            "max_new_tokens": 5,
        }
    )
    [answer] = chat.chat(rows[0]["messages"][:1], images=rows[0]["images"])
    assert answer.response_length > 0
    engine = chat.engine
    for row in rows:
        messages = engine.template.mm_plugin.process_messages(
            row["messages"], row["images"], [], [], engine.processor
        )
        [(prompt, response)] = engine.template.encode_multiturn(engine.tokenizer, messages)
        ids, labels = expected(model, row)
        length = len(prompt) + len(response)
        assert prompt + response == ids[:length]
        assert [-100] * len(prompt) + response == labels[:length]
        assert set(labels[length:]) <= {-100}
        asked = [messages[0], {"role": "assistant", "content": ""}]
        assert engine.template.encode_oneturn(engine.tokenizer, asked)[0] == prompt
