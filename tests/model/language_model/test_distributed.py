"""Two gloo processes on the CPU give what one gives, for each engine that splits the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path, ids):
    torch.manual_seed(0)
    config = LlamaMoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        meta_expert=True,
        router_aux_loss_coef=0.1,
    )
    LlamaMoeForCausalLM(config).save_pretrained(tmp_path / "mixture")
    torch.save(ids % 96, tmp_path / "mixture" / "ids.pt")
    return tmp_path / "mixture"


def run_on_two_processes(mode, checkpoint):
    result = checkpoint.parent / f"{mode}.pt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), mode, str(checkpoint), str(result)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(result)


@pytest.mark.parametrize(("mode", "num_local_experts"), [("tensor", 4), ("expert", 2), ("fsdp", 2)])
def test_two_processes_give_the_logits_losses_and_gradients_of_one(
    mode, num_local_experts, checkpoint
):
    found = run_on_two_processes(mode, checkpoint)
    ids = torch.load(checkpoint / "ids.pt")
    model = LlamaMoeForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(found["logits"], model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    output = model.train()(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(found["loss"], output.loss)
    torch.testing.assert_close(found["aux_loss"], output.aux_loss)
    torch.testing.assert_close(
        found["gate_gradient"], model.model.layers[0].mlp.gate.weight.grad, atol=1e-5, rtol=1e-4
    )
    assert found["num_local_experts"] == num_local_experts


def test_fully_sharded_model_is_saved_whole(checkpoint):
    run_on_two_processes("fsdp", checkpoint)
    saved = LlamaMoeForCausalLM.from_pretrained(checkpoint.parent / "saved")
    for (name, ours), original in zip(
        saved.named_parameters(),
        LlamaMoeForCausalLM.from_pretrained(checkpoint).parameters(),
        strict=True,
    ):
        assert torch.equal(ours, original), name
