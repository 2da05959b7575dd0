"""The small files of a checkpoint: its config, architecture, generation config, and dtypes."""

import re
from collections.abc import Mapping
from pathlib import Path

import jinja2
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from typing_extensions import Unpack

from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.storage.errors import reading
from moellava.storage.limits import limit, require_bounded
from moellava.storage.sources import (
    HubKeywords,
    HubOptions,
    find_file,
    listing,
    parse_source,
    read_json,
)

# What the original code of LLaVA, MoE-LLaVA and Med-MoE calls its models.
ORIGINAL_LLAVA = re.compile(r"(moe_)?llava_\w+|llava_phi|llava")
# Values that mean something only when tokens are sampled.
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
GENERATION_FILE = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def load_model_config(
    model_name_or_path: str | Path, **hub: Unpack[HubKeywords]
) -> PreTrainedConfig:
    """Load the config of a language model or of a saved multimodal model.

    Raises:
        OSError: if there is no `config.json` at that id or folder, or it cannot be read.
        ValueError: if it is a checkpoint of the original LLaVA's code.
    """
    name, place = _place_of(model_name_or_path)
    settings = _settings_of(name, place, HubOptions(**hub))
    _require_not_original(name, settings)
    require_bounded(f"the config.json of {name}", settings)
    try:
        with reading(place, "a config"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                place, trust_remote_code=False, **hub
            )
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(name, error) from error
    return config


def open_processor(place: str, hub: HubOptions) -> MoeLlavaProcessor:
    """The processor of a saved model, tried on one conversation.

    Raises:
        OSError: a file is missing.
        ValueError: a file cannot be read, is of another kind of processor, or does not work.
    """
    with reading(place, "a processor"):
        processor: MoeLlavaProcessor = MoeLlavaProcessor.from_pretrained(
            place,
            trust_remote_code=False,
            **hub.keywords,  # type: ignore[arg-type]  # a revision may be None
        )
        if processor.chat_template is not None:
            _require_works(processor)
    return processor


def _require_works(processor: MoeLlavaProcessor) -> None:
    try:
        text = processor.apply_chat_template(_SAMPLE, tokenize=False)
    except ValueError as error:
        # A template may refuse the sample by raise_exception, such as one that wants a system turn.
        if type(error.__cause__) is jinja2.TemplateError:
            return
        raise
    processor(text=text, padding=True)


def model_type_of(model_name_or_path: str | Path, **hub: Unpack[HubKeywords]) -> str:
    """What `config.json` calls its architecture, even if transformers does not know it.

    Raises:
        OSError: as `load_model_config`.
    """
    name, place = _place_of(model_name_or_path)
    return str(_settings_of(name, place, HubOptions(**hub)).get("model_type", ""))


def load_generation_config(
    model_name_or_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    **hub: Unpack[HubKeywords],
) -> GenerationConfig:
    """How a model generates unless told otherwise, with the tokenizer's padding token.

    A checkpoint without `generation_config.json` gets one with the tokenizer's own tokens.

    Raises:
        ValueError: if the file is there, but cannot be read.
    """
    source = parse_source(model_name_or_path, HubOptions(**hub))
    path = find_file(source, GENERATION_FILE, download=True, required=False)
    if path is None:  # optional in a repo; the tokenizer knows what is needed
        config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
        )
    else:
        config = read_generation_config(path)
    # TinyLlama's file says 0 (<unk>), its tokenizer </s>: what pads the prompts pads the answers.
    config.pad_token_id = tokenizer.pad_token_id
    return config


def read_generation_config(path: Path) -> GenerationConfig:
    """The generation config in a file, as it can be saved again.

    Vicuna's and Llama 2's files have a temperature, but do not sample: transformers ignores the
    value when it generates and refuses to save it.

    Raises:
        ValueError: if the file cannot be read; it is named.
    """
    settings = read_json(path)
    with reading(path, "a generation config"):
        config: GenerationConfig = GenerationConfig.from_dict(settings)
        for name in _TOKEN_IDS:
            _require_token_ids(name, getattr(config, name))
    return savable(config)


def _require_token_ids(name: str, found: object) -> None:
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) and 0 <= one < limit("vocabulary") for one in ids):
        raise ValueError(f"{name} is {found!r}; expected the number of a token, or a list of them.")


def savable(config: GenerationConfig) -> GenerationConfig:
    """The config without values that do nothing: transformers would refuse to save them.

    A maximal length goes too, since it would be a second limit beside `max_new_tokens`, with a
    warning at each answer.
    """
    default = GenerationConfig()
    config.max_length = default.max_length
    if not config.do_sample:
        for name in SAMPLING:
            setattr(config, name, getattr(default, name))
    return config


def _place_of(model_name_or_path: str | Path) -> tuple[str, str]:
    """What the user wrote, and what transformers is asked for."""
    name = str(model_name_or_path)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name, name
    if not (folder / "config.json").is_file():
        raise OSError(
            f"The folder {name!r} is not a checkpoint: it has no config.json (found: "
            f"{listing(folder)}). Give the folder that save_pretrained wrote."
        )
    return name, str(folder)


def _settings_of(name: str, place: str, hub: HubOptions) -> dict[str, object]:
    """The content of `config.json`, whatever architecture it is."""
    folder = Path(place)
    if folder.is_dir():
        return read_json(folder / "config.json")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(place, **hub.keywords)
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    return dict(settings)


def _require_not_original(name: str, settings: Mapping[str, object]) -> None:
    """Refuse the layouts of LLaVA's own code, before anything of 7B is allocated."""
    model_type = str(settings.get("model_type", ""))
    is_original = ORIGINAL_LLAVA.fullmatch(model_type) and "text_config" not in settings
    if not is_original:
        return
    raise ValueError(
        f"{name!r} is a checkpoint of the original code of LLaVA, MoE-LLaVA or Med-MoE (model_type "
        f"{model_type!r}), which cannot be opened whole. What can be used: a checkpoint converted "
        "for transformers, such as llava-hf/llava-1.5-7b-hf; its projector, with "
        f"projector_config={{'path': {name!r}}} around the same tower; and MoE-LLaVA's language "
        f"model, with {{'model_name_or_path': {name!r}, 'mm_vision_tower': ...}}."
    )


def _unreadable(name: str, error: Exception) -> OSError:
    return OSError(f"The config.json of {name!r} cannot be read: {error}")


def _not_found(name: str, error: Exception) -> OSError:
    return OSError(
        f"No model {name!r} is found, neither as a folder nor on the hub or in its cache. Check "
        f"the spelling, or fetch it on a machine with a network: hf download {name}\n{error}"
    )
