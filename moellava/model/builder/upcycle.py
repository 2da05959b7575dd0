"""A multimodal model with a dense language model in, the same with a mixture of experts out."""

from collections.abc import Mapping

from moellava.model.checkpoint.llava import LanguageModelOf
from moellava.model.checkpoint.strict import model_from_tensors
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model.router_weights import RouterSource
from moellava.model.language_model.upcycling import (
    Upcycling,
    moe_config_from_dense,
    upcycled_tensors,
)
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration, joined_name
from moellava.model.quantization import require_ordinary


def upcycle_loaded(
    loaded: LoadedModel,
    moe_config: Mapping[str, object] | None = None,
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
        seed, noise, keep_function, router: fields of `Upcycling`.

    Raises:
        ValueError: if the language model is not a dense Llama, or for options that no mixture could
            be built from.
    """
    upcycling = Upcycling(seed=seed, noise=noise, keep_function=keep_function, router=router)
    dense: MoeLlavaForConditionalGeneration = loaded.model
    require_ordinary(dense, "A mixture made of a dense model")
    config = upcycled_config(dense.config, upcycling.labelled(moe_config or {}))
    state_dict = {
        name: tensor
        for name, tensor in dense.state_dict().items()
        if not name.startswith(("model.language_model.", "lm_head."))
    }
    reader = LanguageModelOf("the dense language model", dense)
    tensors = upcycled_tensors(reader, config.text_config, upcycling, dtype=dense.dtype)
    for name, tensor in tensors:
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


def upcycled_config(config: MoeLlavaConfig, moe_config: Mapping[str, object]) -> MoeLlavaConfig:
    """The config of the mixture that a dense model becomes.

    Arguments and errors are those of `upcycle_loaded`.
    """
    mixture = moe_config_from_dense(config.text_config, **moe_config)
    return MoeLlavaConfig(**{**config.to_dict(), "text_config": mixture})
