"""The model that a stage trains, built of what it starts from.

| name | what it gives |
|---|---|
| `prepare_model` | the model with `requires_grad` set, adapters included |
| `choose_learning` | the same of a model that is there |
| `build_model`, `outline_model` | the same before that, with weights or on the meta device |
| `outline_stage` | what a stage makes of a model that may not be trained yet, on the meta device |
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

from moellava.model.builder.assembly import configure
from moellava.model.builder.request import read_build_request
from moellava.model.builder.upcycle import upcycle_loaded, upcycled_config
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.configs import load_model_config, open_processor
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model.configuration_llama_moe import is_mixture_config
from moellava.model.load_options import LoadOptions
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.storage.sources import HubOptions
from moellava.train.adapters import with_adapters
from moellava.train.options import Recipe
from moellava.train.rates import require_rates
from moellava.train.router_file import router_for
from moellava.train.stage import stage_of
from moellava.train.start import find_start
from moellava.train.trainable import set_trainable


def prepare_model(recipe: Recipe, *, on_meta: bool = False) -> tuple[nn.Module, LoadedModel]:
    """The model that a stage trains, with `requires_grad` set.

    Args:
        on_meta: without weights, on torch's meta device, to count and not to compute.

    Returns:
        The model to train, a PEFT model if the recipe has `lora`; and the `LoadedModel` inside.

    Raises:
        OSError: if there is nothing to start from.
        ValueError: if the start is not what the stage needs; the message says what is missing.
    """
    loaded = outline_model(recipe) if on_meta else build_model(recipe)
    return choose_learning(loaded.model, recipe), loaded


def choose_learning(model: MoeLlavaForConditionalGeneration, recipe: Recipe) -> nn.Module:
    """Let learn what the recipe says, and freeze all else.

    Returns:
        The model, or a PEFT model around it if the recipe has `lora`.

    Raises:
        ValueError: for parts, blocks, adapters or rates that the model cannot have.
    """
    parts = recipe.trainable or stage_of(recipe).trainable
    blocks = recipe.tower_blocks
    set_trainable(model, parts, tower_blocks=blocks)
    learning: nn.Module = model
    if recipe.lora is not None:
        learning = with_adapters(model, parts, recipe.lora, seed=recipe.seed, tower_blocks=blocks)
    require_rates(learning, recipe.optim.rates)
    return learning


def build_model(recipe: Recipe) -> LoadedModel:
    """As `prepare_model`, before anything is chosen to be trained."""
    start = find_start(recipe)
    if start is None:
        loaded = load_pretrained_model(
            recipe.model, moe_config=False, dtype=_dtype(recipe), seed=recipe.seed
        )
    else:
        loaded = load_pretrained_model(start, dtype=_dtype(recipe))
    if not _becomes_mixture(recipe, loaded.model.config):
        return loaded
    moe = recipe.moe
    config = upcycled_config(loaded.model.config, moe.config)
    router = router_for(recipe, config)
    mixture = upcycle_loaded(
        loaded,
        moe.config,
        seed=recipe.seed,
        noise=moe.noise,
        keep_function=moe.keep_function,
        router=router,
    )
    if hasattr(config, "expert_labels"):
        mixture.model.config.expert_labels = config.expert_labels
    return mixture


def outline_model(recipe: Recipe) -> LoadedModel:
    """As `build_model`, on the meta device: only a separate tower's weights are read."""
    start = find_start(recipe)
    config: PreTrainedConfig
    if start is None:
        options = LoadOptions(dtype=_dtype(recipe), moe_config=False)
        config, processor = configure(read_build_request(recipe.model), options)
    else:
        config = load_model_config(start)
        if not isinstance(config, MoeLlavaConfig):  # a LLaVA: its sizes are known once it is read
            return build_model(recipe)
        processor = open_processor(start, HubOptions())
    outlined = outline_stage(recipe, config, processor)
    if _becomes_mixture(recipe, config):
        router_for(recipe, outlined.model.config)
    return outlined


def outline_stage(
    recipe: Recipe, start: MoeLlavaConfig, processor: MoeLlavaProcessor
) -> LoadedModel:
    """The model that a stage makes of another one, on the meta device; `moe.router` is not read.

    Args:
        start: the config of the model that the stage starts from.
    """
    config = start
    if _becomes_mixture(recipe, start):
        config = upcycled_config(start, recipe.moe.config)
    with torch.device("meta"):
        model = MoeLlavaForConditionalGeneration(config)
    nn.Module.to(model, _dtype(recipe))  # transformers' own `to` has no types
    return LoadedModel(model, processor)


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.optim.precision == "bf16_weights" else torch.float32


def _becomes_mixture(recipe: Recipe, config: MoeLlavaConfig) -> bool:
    """Whether the stage makes a mixture of its start, rather than train one further."""
    if not stage_of(recipe).makes_mixture:
        return False
    is_mixture = is_mixture_config(config.text_config)
    if is_mixture and recipe.moe.config:
        raise ValueError(
            f"{recipe.start_from} is a mixture of experts already, so moe.config cannot choose its "
            "experts. Start from the dense model of stage 'tune', or set moe.config={} to train "
            "this mixture further."
        )
    return not is_mixture
