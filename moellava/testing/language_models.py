"""Stand-in language models: files, tokenizers and chat templates of TinyLlama and SmolLM2.

The weights are small and random.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig

# TinyLlama's format: a role line, the text, </s>; the role tags are ordinary text, not tokens.
TINYLLAMA_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

SMOLLM2_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "What modality is this? Is this a CT image? Which organ is shown? Is there a fracture? yes no",
    "The radiograph shows the lungs, the heart, the liver, the spine. "
    "Stained tissue under the microscope.",
    "<|system|> <|user|> <|assistant|> Answer the question. Describe the image in detail.",
)


def write_tinyllama(
    folder: Path,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 176,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 32000,
    corpus: Iterable[str] = _CORPUS,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a Llama repo laid out like `TinyLlama/TinyLlama-1.1B-Chat-v1.0`, by default tiny.

    The tokenizer's merges are learned from `corpus`; entries that a small corpus cannot fill are
    placeholders, so that the vocabulary has exactly `vocab_size` rows. `tokenizer.model` is left
    out: transformers reads `tokenizer.json`.

    Returns:
        The folder, with `config.json`, `model.safetensors`, `generation_config.json` and the
        tokenizer's files.
    """
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    write_llama_tokenizer(folder, corpus, vocab_size)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        dtype=dtype,
    )
    return _write_model(
        folder, config, seed, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=2048
    )


def write_smollm2(
    folder: Path,
    *,
    hidden_size: int = 72,
    intermediate_size: int = 192,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 9,
    num_key_value_heads: int = 3,
    vocab_size: int = 49152,
    corpus: Iterable[str] = _CORPUS,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a Llama repo laid out like `HuggingFaceTB/SmolLM2-135M-Instruct`, by default tiny.

    Tied embeddings, a byte-level tokenizer that adds no beginning-of-text token, ChatML turns, and
    a pad token that is the end-of-turn token.

    Returns:
        The folder, with `config.json`, `model.safetensors`, `generation_config.json` and the
        tokenizer's files.
    """
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    _write_byte_level_tokenizer(folder, corpus, vocab_size)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype=dtype,
    )
    return _write_model(folder, config, seed, bos_token_id=1, eos_token_id=2, pad_token_id=2)


def _write_model(folder: Path, config: "LlamaConfig", seed: int, **generation: int) -> Path:
    """Random weights in the config's dtype, and the generation config."""
    from transformers import GenerationConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.to(config.dtype)  # type: ignore[arg-type]  # transformers' decorator hides its signature
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    return folder


def _write_byte_level_tokenizer(folder: Path, corpus: Iterable[str], vocab_size: int) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        corpus, vocab_size=vocab_size, special_tokens=specials, show_progress=False
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    pieces += [f"<placeholder_{index}>" for index in range(vocab_size - len(pieces))]
    tokenizer = GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(pieces)},
        merges=[tuple(merge) for merge in learned["merges"]],  # type: ignore[misc]  # says str
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
    )
    tokenizer.chat_template = SMOLLM2_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_llama_tokenizer(
    folder: Path, corpus: Iterable[str] = _CORPUS, vocab_size: int = 32000
) -> None:
    """Write TinyLlama's tokenizer files, which are Llama 2's, with merges learned from `corpus`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    printable = [chr(code) for code in range(33, 127)]
    learner = Tokenizer(models.BPE())
    # Merges are learned inside words; the tokenizer itself keeps spaces as "▁", like Llama's.
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁")
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - len(specials) - len(byte_tokens), 0),
        initial_alphabet=[*printable, "▁", "\n"],
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)

    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = [*specials, *byte_tokens, *(piece for piece in pieces if piece not in specials)]
    if len(vocabulary) > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the smallest tokenizer for this corpus has "
            f"{len(vocabulary)}."
        )
    vocabulary += [f"<placeholder_{index}>" for index in range(vocab_size - len(vocabulary))]

    tokenizer = LlamaTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[tuple(merge) for merge in learned["merges"]],
        legacy=False,
        add_bos_token=True,
        pad_token="</s>",
        padding_side="right",
        model_max_length=2048,
    )
    tokenizer.chat_template = TINYLLAMA_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
