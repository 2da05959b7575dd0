"""32 questions at once: tokens per second of vLLM and of our `generate`, in one environment.

python tests/vllm/speed.py OUT prepare          a mixture of SmolLM2-135M's shapes, ViT-B/16, bf16
python tests/vllm/speed.py OUT generate         a batch of 32
python tests/vllm/speed.py OUT vllm             32 requests, answered together
"""

import argparse
import json
import time
from pathlib import Path

NUM_QUESTIONS = 32
NEW_TOKENS = 64
SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def prepare(out: Path) -> None:
    from moellava.model.builder_enhanced import load_pretrained_model
    from moellava.testing import write_biomedclip, write_smollm2
    from tests.vllm.checkpoints import conversations

    write_smollm2(out / "language_model", **SIZES)
    write_biomedclip(out / "biomedclip")
    parts = {
        "model_name_or_path": str(out / "language_model"),
        "mm_vision_tower": str(out / "biomedclip"),
    }
    loaded = load_pretrained_model(parts, moe_config={"noise": 0.1})
    loaded.model.save_pretrained(out / "model")
    loaded.processor.save_pretrained(out / "model")
    with_one_image = [chat for chat in conversations() if len(chat[0]["content"]) == 2]
    chats = (with_one_image * NUM_QUESTIONS)[:NUM_QUESTIONS]
    (out / "chats.json").write_text(json.dumps(chats))


def generate(out: Path) -> tuple[float, int]:
    import torch

    from moellava.model.builder_enhanced import load_pretrained_model
    from tests.vllm.checkpoints import own_messages

    loaded = load_pretrained_model(out / "model")
    chats = [own_messages(chat) for chat in json.loads((out / "chats.json").read_text())]
    options = {"max_length": None, "do_sample": False}
    start = time.perf_counter()
    inputs = loaded.processor.apply_chat_template(
        chats,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    with torch.inference_mode():
        output = loaded.model.generate(
            **inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **options
        )
    seconds = time.perf_counter() - start
    return seconds, (output.shape[1] - inputs["input_ids"].shape[1]) * len(output)


def vllm(out: Path) -> tuple[float, int]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(out / "model"),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=NUM_QUESTIONS,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    chats = json.loads((out / "chats.json").read_text())
    start = time.perf_counter()
    outputs = engine.chat(chats, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=("prepare", "generate", "vllm"))
    given = parser.parse_args()
    if given.part == "prepare":
        prepare(given.out)
        return
    seconds, num_tokens = {"generate": generate, "vllm": vllm}[given.part](given.out)
    print(
        f"RESULT | {given.part} | {NUM_QUESTIONS} questions with one image | {num_tokens} tokens "
        f"in {seconds:.1f} s | {num_tokens / seconds:.0f} tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
