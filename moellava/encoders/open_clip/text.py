"""The text side of an open_clip checkpoint: words in, unit vectors of the joint space out.

ClipText            the tower, and scale and bias of the logits
load_text           its weights from a checkpoint
text_settings       its config from a checkpoint
load_tokenizer      its tokenizer
"""

import logging
import os
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoConfig

from moellava.encoders.open_clip.configuration import BiomedClipVisionConfig
from moellava.encoders.open_clip.files import CONFIG_FILE
from moellava.storage.errors import reading
from moellava.storage.sources import JsonObject, Source, find_file, parse_source, read_json
from moellava.storage.weights import read_weights, require_fit

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "special_tokens_map.json",
)
# What `tokenizer_kwargs` may set: open_clip's own settings.
TOKENIZER_OPTIONS = (
    *("clean", "strip_sep_token", "language"),
    *("additional_special_tokens", "reduction_mask"),
)
# A config of the text model that lies beside the weights, for machines that see no hub.
TEXT_CONFIG_FILE = "text_config.json"
# BiomedBERT's published config is BERT-base's own default; it was renamed from PubMedBERT.
BERT_BASE_REPOS = (
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract",
)


class Tokenizer(Protocol):
    """What open_clip's tokenizers do: (B, T) ids of texts."""

    def __call__(self, texts: list[str]) -> Tensor: ...


class ClipText(nn.Module):
    """Text tower, logit scale (stored as a logarithm) and, for SigLIP-like models, logit bias."""

    def __init__(self, config: BiomedClipVisionConfig):
        super().__init__()
        self.tower = _build_tower(config)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.has_logit_bias else None

    def forward(self, token_ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, P) vectors of unit length."""
        output = self.tower(token_ids)
        vectors = (
            output[0] if isinstance(output, tuple) else output
        )  # CoCa's tower also returns tokens
        return nn.functional.normalize(vectors, dim=-1)

    def probabilities(self, image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
        """(B, L): softmax over the labels, or a sigmoid per label if there is a logit bias."""
        logits = self.logit_scale.exp() * image_vectors @ text_vectors.T
        return (
            logits.softmax(-1) if self.logit_bias is None else (logits + self.logit_bias).sigmoid()
        )


def text_settings(model_cfg: JsonObject, source: Source, weights_file: Path) -> JsonObject:
    """The config fields of the text side: open_clip's `text_cfg`, and its text model's config.

    Raises:
        OSError: that config is on no disk here; the text has the command that fetches it.
    """
    text_cfg = model_cfg.get("text_cfg")
    if not isinstance(text_cfg, dict):
        raise ValueError(
            f"{source.name} has no model_cfg.text_cfg, so it has no text tower: load_text=False."
        )
    state = read_weights(weights_file, ("text.", "logit_bias"))
    settings = {"text_cfg": text_cfg, "has_logit_bias": "logit_bias" in state}
    if text_cfg.get("hf_model_name"):
        settings["text_model_config"] = text_model_config(text_cfg["hf_model_name"], source, state)
    return settings


def without_local_paths(text_cfg: JsonObject) -> JsonObject:
    """`text_cfg` as it may be saved: a folder of this machine is called by its own name only.

    A saved encoder carries the text model's config and tokenizer, so that nothing is looked for
    under these names.
    """
    names = ("hf_model_name", "hf_tokenizer_name")
    local = {
        name: Path(text_cfg[name]).name for name in names if os.path.isdir(text_cfg.get(name) or "")
    }
    return text_cfg | local


def load_text(config: BiomedClipVisionConfig, weights_file: Path) -> ClipText:
    """The text side with its weights; nothing may be missing or left over."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = {
        key: value
        for key, value in read_weights(weights_file).items()
        if not key.startswith("visual.")
    }
    if "positional_embedding" in state:  # CLIP's own layout keeps the text tower at the root
        state = convert_to_custom_text_state_dict(state)
    # An index buffer that transformers stopped saving in 4.31.
    state.pop("text.transformer.embeddings.position_ids", None)
    text = ClipText(config)  # not on meta: text towers have buffers that no checkpoint holds
    own = {key.replace("text.", "tower.", 1): value for key, value in state.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in own:
            own[name] = own[name].reshape(())
    # CoCa's captioner is no part of zero-shot classification.
    own = {key: value for key, value in own.items() if not key.startswith("text_decoder.")}
    result = text.load_state_dict(own, strict=False)
    require_fit(weights_file, missing=result.missing_keys, unexpected=result.unexpected_keys)
    return text


def load_tokenizer(config: BiomedClipVisionConfig, source: Source) -> Tokenizer:
    """open_clip's tokenizer for the text tower, from the checkpoint's own files if it has any."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text_cfg = config.text_cfg or {}
    context_length = text_cfg.get("context_length", 77)
    options = _tokenizer_options(text_cfg)
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        simple: Tokenizer = SimpleTokenizer(context_length=context_length, **options)
        return simple
    files = [find_file(source, file, download=True, required=False) for file in TOKENIZER_FILES]
    found = next((file for file in files if file is not None), None)
    location = str(found.parent) if found is not None else name
    hub = {} if found is not None else {"local_files_only": source.hub.local_files_only}
    with reading(location, "a tokenizer"):
        tokenizer: Tokenizer = HFTokenizer(
            location,
            context_length=context_length,
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            trust_remote_code=False,
            **hub,
            **options,
        )
    return tokenizer


def _tokenizer_options(text_cfg: JsonObject) -> JsonObject:
    """`tokenizer_kwargs` of an open_clip config, of which a file may set only some.

    They go on to transformers, where others read files of any name or run code.
    """
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"tokenizer_kwargs is {options!r}; expected a mapping.")
    for name in options:
        if name not in TOKENIZER_OPTIONS:
            raise ValueError(
                f"tokenizer_kwargs of {CONFIG_FILE} sets {name!r}; known: "
                f"{', '.join(TOKENIZER_OPTIONS)}. Remove it from the file."
            )
    return options


def _build_tower(config: BiomedClipVisionConfig) -> nn.Module:
    from open_clip.hf_model import HFTextEncoder
    from open_clip.model import _build_text_tower

    text_cfg = dict(config.text_cfg or {})
    if not text_cfg.get("hf_model_name"):
        own: nn.Module = _build_text_tower(config.embed_dim, text_cfg, config.quick_gelu)
        return own
    settings = dict(config.text_model_config or {})
    settings.pop("auto_map", None)  # names code that is not ours to run
    with reading(config.tower or "the text tower", "a text model's config"):
        model_config = AutoConfig.for_model(**settings)
    if model_config.is_encoder_decoder:
        raise ValueError(
            f"{text_cfg['hf_model_name']} is an encoder-decoder text tower; load_text=False."
        )
    tower: nn.Module = HFTextEncoder(
        text_cfg["hf_model_name"],
        output_dim=config.embed_dim,
        config=model_config,  # with it, open_clip asks no hub for one (open_clip#772)
        pooler_type=text_cfg.get("hf_pooler_type", "mean_pooler"),
        proj_type=text_cfg.get("hf_proj_type", "mlp"),
        pretrained=False,
    )
    if text_cfg.get("hf_pooler_type") != "cls_pooler" and hasattr(tower.transformer, "pooler"):
        tower.transformer.pooler = None  # open_clip 3.3 adds one here that no checkpoint has
    text_tower: nn.Module = tower
    return text_tower


def text_model_config(name: str, source: Source, state: dict[str, Tensor]) -> JsonObject:
    """The Hugging Face config of the text model, without a network where that can be."""
    if os.path.isdir(name):
        return read_json(Path(name) / "config.json")
    beside = find_file(source, TEXT_CONFIG_FILE, required=False)
    if beside is not None:
        return read_json(beside)
    cached = try_to_load_from_cache(name, "config.json", cache_dir=source.hub.cache_dir)
    if isinstance(cached, str):
        return read_json(Path(cached))
    embedding = state.get("text.transformer.embeddings.word_embeddings.weight")
    if name in BERT_BASE_REPOS and embedding is not None and embedding.shape == (30522, 768):
        logger.info("the text model %s has BERT-base's config; no file of it is needed", name)
        return {"model_type": "bert"}
    try:
        path = find_file(
            parse_source(f"hf-hub:{name}", source.hub.at(None)), "config.json", download=True
        )
    except OSError as error:
        where = f"{source.folder}/{TEXT_CONFIG_FILE}" if source.folder else "the cache"
        raise OSError(
            f"The text tower of {source.name} is a {name}, whose config.json is not on this "
            f"machine. {error} Only that one file is needed; it may also be put at {where}."
        ) from error
    assert path is not None
    return read_json(path)
