"""Tiny checkpoints of each kind, and what our own `generate` answers: the reference for vLLM.

python tests/vllm/checkpoints.py OUT    writes, for each kind, the checkpoints OUT/<kind> and
                                        OUT/<kind>.remote, and answers/<kind>.json; questions.json
"""

import argparse
import base64
import io
import json
from pathlib import Path

import torch
import transformers
from PIL import Image

from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.model.publish.remote_code import write_remote_code
from moellava.testing import write_biomedclip, write_openai_clip, write_tinyllama
from moellava.testing.datasets import picture

NEW_TOKENS = 24
TOP = 5  # log-probabilities that are compared at each token
MOST_IMAGES = 3

MED_MOE = {
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "router_bias": True,
    "meta_expert": True,
}
# Name to (tower, projector's type and options, mixture's options or False for a dense model).
KINDS: dict[str, tuple[str, dict[str, object], object]] = {
    "mixture-clip-mlp": ("clip", {"type": "mlp2x_gelu"}, {}),
    "medmoe-biomedclip-mlp": ("biomedclip", {"type": "mlp2x_gelu"}, MED_MOE),
    "dense-siglip-linear": ("siglip", {"type": "linear"}, False),
    "mixture-biomedclip-perceiver": (
        "biomedclip",
        {"type": "perceiver", "num_latents": 16, "num_layers": 2},
        {"moe_layers": "dense"},
    ),
    "medmoe-clip-qformer": (
        "clip",
        {"type": "qformer", "num_query_tokens": 8, "num_layers": 2, "hidden_size": 64},
        MED_MOE,
    ),
    "mixture-siglip-identity": ("siglip", {"type": "identity"}, {}),
    "mixture-biomedclip-pixel_shuffle": ("biomedclip", {"type": "pixel_shuffle"}, {}),
    "dense-biomedclip-average_pool": ("biomedclip", {"type": "average_pool"}, False),
}


def write_siglip(folder: Path) -> None:
    """A SigLIP of the language model's width, so that the identity can stand between them."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 99}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    transformers.SiglipModel(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    transformers.SiglipImageProcessor(size=size).save_pretrained(folder)


TOWERS = {
    "clip": write_openai_clip,
    "siglip": write_siglip,
    "biomedclip": lambda folder: write_biomedclip(folder, vision="vit_tiny_patch16_224"),
}


def conversations() -> list[list[dict[str, object]]]:
    """40 questions in OpenAI's form: 8 of text alone, 16 with one image, 8 with two, 8 with 3."""
    chats = []
    for number in range(40):
        num_images = (0, 1, 1, 2, 3)[number % 5]
        content: list[dict[str, object]] = [
            {"type": "image_url", "image_url": {"url": _data_uri(100 * number + index)}}
            for index in range(num_images)
        ]
        question = "Is there a fracture? " * (1 + number % 4) + f"Question {number}."
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
    return chats


def _data_uri(seed: int) -> str:
    buffer = io.BytesIO()
    picture(seed, size=(64 + 16 * (seed % 3), 48)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def build(kind: str, place: Path) -> LoadedModel:
    """A model of a kind, in float32; weights so large that images and routes change the answer."""
    tower, projector, moe_config = KINDS[kind]
    if not (place / "language_model").exists():
        sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2000}
        write_tinyllama(place / "language_model", **sizes, dtype=torch.float32)
    if not (place / tower).exists():
        TOWERS[tower](place / tower)
    description = {
        "model_name_or_path": str(place / "language_model"),
        "mm_vision_tower": str(place / tower),
    }
    loaded = load_pretrained_model(
        description,
        encoder_type=tower,
        projector_config=projector,
        moe_config=moe_config,
        dtype="float32",
    )
    torch.manual_seed(0)
    language_model = loaded.model.model.language_model
    with torch.no_grad():  # upcycled experts are copies of each other
        for weight in (*language_model.parameters(), *loaded.model.lm_head.parameters()):
            if weight.dim() > 1 or weight.numel() == 4:  # matrices, and biases of routers
                weight.normal_(std=0.08)
    return loaded


def own_messages(chat: list[dict[str, object]]) -> list[dict[str, object]]:
    """A question in OpenAI's form as our processor takes it, with PIL images."""
    items = []
    for item in chat[0]["content"]:  # type: ignore[attr-defined]
        if item["type"] == "image_url":
            code = item["image_url"]["url"].partition(",")[2]
            item = {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(code)))}
        items.append(item)
    return [{"role": "user", "content": items}]


def reference(loaded: LoadedModel, chat: list[dict[str, object]]) -> dict[str, object]:
    """Prompt ids, greedy tokens and top log-probabilities by `generate`, one prompt at a time."""
    inputs = loaded.processor.apply_chat_template(
        own_messages(chat),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = loaded.model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        max_length=None,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = [logits[0].float().log_softmax(-1).topk(TOP) for logits in output.logits]
    prompt = inputs["input_ids"][0].tolist()
    tokens = output.sequences[0].tolist()[len(prompt) :]
    return {
        "prompt": prompt,
        "tokens": tokens,
        "top": [dict(zip(t.indices.tolist(), t.values.tolist(), strict=True)) for t in top],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    (out / "answers").mkdir(parents=True, exist_ok=True)
    chats = conversations()
    questions = {
        "chats": chats,
        "new_tokens": NEW_TOKENS,
        "top": TOP,
        "most_images": MOST_IMAGES,
    }
    (out / "questions.json").write_text(json.dumps(questions))
    for kind in KINDS:
        loaded = build(kind, out / "parts")
        for folder in (out / kind, out / f"{kind}.remote"):
            loaded.model.save_pretrained(folder)
            loaded.processor.save_pretrained(folder)
        write_remote_code(out / f"{kind}.remote")
        with torch.inference_mode():
            answers = [reference(loaded, chat) for chat in chats]
        (out / "answers" / f"{kind}.json").write_text(json.dumps(answers))
        distinct = len({tuple(answer["tokens"]) for answer in answers})  # type: ignore[arg-type]
        print(f"{kind}: {distinct} distinct answers of {len(answers)}", flush=True)


if __name__ == "__main__":
    main()
