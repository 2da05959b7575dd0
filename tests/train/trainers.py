"""One optimizer step of other people's trainers, and the same step computed plainly.

python trainers.py FOLDER: two processes for each trainer, in forks; writes FOLDER/<name>.<rank>.pt.
`run(name, folder)` does it in this process. Every step is SGD at rate 1, so that a weight's change
is its gradient with the other sign.
"""

import copy
import os
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import trl
from PIL import Image
from torch.nn.functional import cross_entropy, logsigmoid

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.language_model.moe import load_balancing_loss, router_z_loss
from moellava.train.router_loss import use_router_loss
from tests.train.children import free_port, in_child
from tests.train.tiny import parts_of, write_tiny

COEF, Z_COEF, BETA = 0.5, 0.1, 0.3
NAMES = ("transformers", "sft", "dpo", "grpo")
ANSWERS = ("yes", "no, it is a retina", "the lungs, and more of them", "tissue")


def build(tiny):
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layers": "dense",
        "router_aux_loss_coef": COEF,
        "router_z_loss_coef": Z_COEF,
    }
    loaded = load_pretrained_model(parts_of(tiny), moe_config=moe, dtype="float32")
    for layer in loaded.model.model.language_model.layers:
        layer.mlp.gate.weight.data *= 5  # routing that is not even
    return loaded


def rows():
    rng = np.random.default_rng(0)
    for number, answer in enumerate(ANSWERS):
        image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        question = "What is this? " + "Look. " * number  # padding
        yield image, question, answer


def message(role, text, image=None):
    if image is None:
        return {"role": role, "content": text}  # TRL puts images in
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return {"role": role, "content": content}


def options(make, folder, num_processes, **more):
    """Four rows a step, whatever the number of processes."""
    return make(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // num_processes, learning_rate=1.0, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, remove_unused_columns=False, disable_tqdm=True,
        gradient_checkpointing=False, dataloader_pin_memory=False, logging_steps=1,
        ddp_find_unused_parameters=True, **more,
    )  # fmt: skip


def make_transformers(loaded, folder, num_processes):
    chats = [
        {"messages": [message("user", question, image), message("assistant", answer)]}
        for image, question, answer in rows()
    ]
    return transformers.Trainer(
        loaded.model,
        args=options(transformers.TrainingArguments, folder, num_processes),
        train_dataset=chats,
        data_collator=ChatCollator(loaded.processor),
    )


def make_sft(loaded, folder, num_processes):
    chats = [
        {"messages": [message("user", question), message("assistant", answer)], "image": image}
        for image, question, answer in rows()
    ]
    return trl.SFTTrainer(
        loaded.model,
        args=options(
            trl.SFTConfig, folder, num_processes, max_length=None, assistant_only_loss=True
        ),
        train_dataset=datasets.Dataset.from_list(chats),
        processing_class=loaded.processor,
    )


def make_dpo(loaded, folder, num_processes):
    pairs = [
        {
            "prompt": [message("user", question)],
            "chosen": [message("assistant", answer)],
            "rejected": [message("assistant", "I do not know")],
            "image": image,
        }
        for image, question, answer in rows()
    ]
    return trl.DPOTrainer(
        loaded.model,
        ref_model=copy.deepcopy(loaded.model),
        args=options(trl.DPOConfig, folder, num_processes, beta=BETA, max_length=None),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=loaded.processor,
    )


def same_reward(completions, **columns):
    """All alike, so that no answer is better than its group and the routers' loss is all."""
    return [1.0 for _ in completions]


def make_grpo(loaded, folder, num_processes):
    prompts = [
        {"prompt": [message("user", question)], "image": image} for image, question, _ in rows()
    ]
    return trl.GRPOTrainer(
        loaded.model,
        reward_funcs=same_reward,
        args=options(
            trl.GRPOConfig, folder, num_processes, num_generations=2, max_completion_length=5,
        ),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=loaded.processor,
    )  # fmt: skip


def run(name, tiny, folder, num_processes=1, remedy=True):
    """Train one step.

    Returns:
        `start` and `end`, the weights; `batches`, what the model was given, in order.
    """
    loaded = build(tiny)
    trainer = globals()[f"make_{name}"](loaded, folder, num_processes)
    if remedy and name != "transformers":
        use_router_loss(trainer)
    batches = []
    start = {key: value.clone() for key, value in loaded.model.state_dict().items()}

    def record(module, args, kwargs):
        is_loss = kwargs.get("fused_lm_head") or name == "transformers"
        if torch.is_grad_enabled() and is_loss:
            keys = ("input_ids", "attention_mask", "pixel_values", "labels")
            batches.append({key: kwargs[key].clone() for key in keys})

    loaded.model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    return {"start": start, "end": loaded.model.state_dict(), "batches": batches,
            "log": trainer.state.log_history[0]}  # fmt: skip


def plain_gradients(name, tiny, batches):
    """By name, of the loss that a trainer should have: no trainer, no processes, no accumulation.

    Args:
        batches: of all processes.
    """
    model = build(tiny).model.train()
    num_labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        labels = batch["labels"][:, 1:]
        given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        outputs = model(**given, output_router_logits=True)
        losses = cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        mask = batch["attention_mask"]
        penalty = COEF * load_balancing_loss(outputs.router_logits, 4, 2, mask)
        penalty = penalty + Z_COEF * router_z_loss(outputs.router_logits, mask)
        if name == "transformers":  # a micro-batch weighs as many labels as it has
            share = int((labels != -100).sum()) / num_labels
            total = total + losses.sum() / num_labels + share * penalty
        elif name == "sft":
            total = total + losses.sum() / num_labels + penalty / len(batches)
        elif name == "dpo":  # at the first step the reference is the model itself
            chosen, rejected = (-losses.sum(1)).chunk(2)
            margins = (chosen - rejected) - (chosen - rejected).detach()
            total = total + (-logsigmoid(BETA * margins).mean() + penalty) / len(batches)
        else:
            total = total + penalty / len(batches)
    total.backward()
    return {key: weight.grad for key, weight in model.named_parameters()}


def fork_all(folder):
    tiny = write_tiny(folder / "tiny", num_rows=1)
    statuses = []
    for name in NAMES:
        port = free_port()
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                step = partial(save_step, name, tiny, folder, rank)
                os._exit(in_child(step, rank=rank, num_processes=2, port=port))
            children.append(child)
        statuses += [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), statuses


def save_step(name, tiny, folder, rank):
    torch.save(run(name, tiny, folder / name, num_processes=2), folder / f"{name}.{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork_all(Path(sys.argv[1]))
