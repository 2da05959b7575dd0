"""Stand-in image encoders: files, keys and layout of the real repos, small random weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BertConfig

OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]
BIOMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"

TEXT_WIDTH = 64
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()/%"


def write_biomedclip(
    folder: Path,
    *,
    vision: str = "vit_base_patch16_224",
    image_size: int = 224,
    embed_dim: int = 512,
    num_text_layers: int = 1,
    full_text: bool = False,
    seed: int = 0,
) -> Path:
    """Write an open_clip repo with BiomedCLIP's files and keys, random weights, a small text tower.

    Args:
        folder: created if missing; receives `open_clip_config.json`, the pickle
            `open_clip_pytorch_model.bin` (float32) and the tokenizer of the text tower.
        vision: a timm model name. The default has BiomedCLIP's real shape (86 M parameters);
            `"vit_tiny_patch16_224"` has the same keys at 5.7 M.
        image_size: side of the square input, in pixels.
        embed_dim: width of the joint image-text space.
        num_text_layers: layers of the BERT stand-in, whose width is 64.
        full_text: a BERT-base of the original's size in its place, which makes the pickle 784 MB.

    Returns:
        The folder.
    """
    from open_clip.timm_model import TimmModel
    from transformers import BertConfig

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    visual = TimmModel(vision, embed_dim=embed_dim, image_size=image_size, pool="", proj="linear")
    state_dict = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    state_dict |= _text_tower(
        BertConfig() if full_text else _bert_config(num_text_layers), embed_dim
    )
    state_dict["logit_scale"] = torch.tensor(4.4454)
    torch.save(state_dict, folder / "open_clip_pytorch_model.bin")

    config = {
        "model_cfg": {
            "embed_dim": embed_dim,
            "vision_cfg": {
                "timm_model_name": vision,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": image_size,
            },
            "text_cfg": {
                "hf_model_name": BIOMEDBERT,
                "hf_tokenizer_name": BIOMEDBERT,
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 256,
            },
        },
        "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    _write_bert_tokenizer(folder)
    return folder


def write_biomedbert(folder: Path, *, num_text_layers: int = 1) -> Path:
    """Write what BiomedCLIP's text tower reads of the BiomedBERT repo: config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    _bert_config(num_text_layers).save_pretrained(folder)
    _write_bert_tokenizer(folder)
    return folder


def write_openai_clip(
    folder: Path, *, image_size: int = 224, patch_size: int = 32, seed: int = 0
) -> Path:
    """Write a transformers CLIP repo: config, `model.safetensors`, `preprocessor_config.json`."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(
        vision_config={**size, "image_size": image_size, "patch_size": patch_size},
        text_config={**size, "vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    ).save_pretrained(folder)
    return folder


def _bert_vocabulary() -> list[str]:
    return [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *_ALPHABET,
        *(f"##{letter}" for letter in _ALPHABET),
    ]


def _write_bert_tokenizer(folder: Path) -> None:
    from transformers import BertTokenizer

    vocabulary = _bert_vocabulary()
    tokenizer = BertTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, do_lower_case=True
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")


def _bert_config(num_layers: int) -> "BertConfig":
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(_bert_vocabulary()),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=128,
    )


def _text_tower(config: "BertConfig", embed_dim: int) -> dict[str, Tensor]:
    """The published text keys: BERT without its pooler, two projections without bias, positions."""
    from transformers import BertModel

    bert = BertModel(config, add_pooling_layer=False)
    hidden = (config.hidden_size + embed_dim) // 2
    return {
        **{f"text.transformer.{key}": value for key, value in bert.state_dict().items()},
        "text.transformer.embeddings.position_ids": torch.arange(512).unsqueeze(0),
        "text.proj.0.weight": torch.randn(hidden, config.hidden_size) * config.hidden_size**-0.5,
        "text.proj.2.weight": torch.randn(embed_dim, hidden) * hidden**-0.5,
    }
