"""A multimodal model with a dense language model → the same with a mixture of experts; nothing else changes.

Public names: `upcycle_loaded`, `upcycled_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moellava.model.checkpoint.strict import model_from_tensors
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.checkpoint.llava import LanguageModelOf
from moellava.model.language_model.router_weights import RouterSource
from moellava.model.language_model.upcycling import moe_config_from_dense, upcycled_tensors
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import joined_name


def upcycle_loaded(
    loaded: LoadedModel,
    moe_config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    noise: float = 0.0,
    keep_function: bool = True,
    router: RouterSource | None = None,
) -> LoadedModel:
    """The mixture that a trained dense model becomes, in the same dtype.

    The new model shares the other weights' memory with `loaded`, which is of no further use.

    Args:
        loaded: with a dense Llama.
        moe_config: fields of `LlamaMoeConfig`.
        seed, noise, keep_function, router: as in `moellava.model.language_model.upcycled_state_dict`.

    Raises:
        ValueError: if the language model is no dense Llama, or for options that no mixture could be built from.
    """
    dense: Any = loaded.model
    config = upcycled_config(dense.config, moe_config or {})
    text_config: Any = config.text_config
    state_dict = {
        name: tensor
        for name, tensor in dense.state_dict().items()
        if not name.startswith(("model.language_model.", "lm_head."))
    }
    reader = LanguageModelOf("the dense language model", dense)
    for name, tensor in upcycled_tensors(
        reader, text_config, dtype=dense.dtype, seed=seed, noise=noise, keep_function=keep_function, router=router
    ):
        state_dict[joined_name(name)] = tensor
    return model_from_tensors(
        state_dict,
        config,
        loaded.processor,
        name="the upcycled model",
        dtype=dense.dtype,
        generation_config=dense.generation_config,
        built_from=dense.built_from,
    )


def upcycled_config(config: MoeLlavaConfig, moe_config: Mapping[str, Any]) -> MoeLlavaConfig:
    """The config of the mixture that a dense model becomes; arguments and errors as `upcycle_loaded`'s."""
    mixture = moe_config_from_dense(config.text_config, **moe_config)
    return MoeLlavaConfig(**{**config.to_dict(), "text_config": mixture})
