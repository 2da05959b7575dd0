"""One of two gloo processes: run a saved mixture in parallel and write what rank 0 saw.

Started by test_distributed.

torchrun --nproc-per-node 2 distributed_worker.py {tensor,expert,fsdp} CHECKPOINT RESULT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from moellava.model.language_model import LlamaMoeForCausalLM

PLANS = {
    "tensor": {"tp_size": 2},
    "expert": {"tp_size": 2, "ep_size": 2},
}


def main(mode: str, checkpoint: str, result: str) -> None:
    dist.init_process_group("gloo")
    ids = torch.load(Path(checkpoint) / "ids.pt")
    if mode == "fsdp":
        model = LlamaMoeForCausalLM.from_pretrained(checkpoint)
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        local = model.model.layers[0].mlp.experts.down_proj.to_local().shape[0]
    else:
        model = LlamaMoeForCausalLM.from_pretrained(
            checkpoint, distributed_config=DistributedConfig(**PLANS[mode])
        )
        weight = model.model.layers[0].mlp.experts.down_proj
        local = weight.to_local().shape[0] if hasattr(weight, "to_local") else weight.shape[0]
    with torch.no_grad():
        logits = model.eval()(ids).logits
    output = model.train()(ids, labels=ids)
    output.loss.backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad
    if hasattr(gradient, "full_tensor"):
        gradient = gradient.full_tensor()
    found = {
        "logits": logits.detach(),
        "loss": output.loss.detach(),
        "aux_loss": output.aux_loss.detach(),
        "gate_gradient": gradient,
        "num_local_experts": local,
    }
    if mode == "fsdp":
        state_dict = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if dist.get_rank() == 0:
            model.save_pretrained(Path(result).parent / "saved", state_dict=state_dict)
    if dist.get_rank() == 0:
        found = {
            name: getattr(value, "full_tensor", lambda v=value: v)()
            for name, value in found.items()
        }
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
