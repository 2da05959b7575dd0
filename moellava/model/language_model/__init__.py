"""The mixture-of-experts language model, registered with transformers' Auto classes.

configuration_llama_moe   which layers are sparse, how many experts they have
moe                       router, experts, losses
modeling_llama_moe        the model
upcycling                 a dense checkpoint becomes a mixture
mixtures                  published mixtures become ours
checkpoint                reading weights
router_weights            one router for all layers
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moellava.model.language_model.checkpoint import dense_state_dict, read_state_dict
from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.mixtures import import_mixture, imported_state_dict
from moellava.model.language_model.modeling_llama_moe import (
    LlamaMoeForCausalLM,
    LlamaMoeModel,
    LlamaMoePreTrainedModel,
)
from moellava.model.language_model.moe import (
    add_router_losses,
    expert_load,
    has_router_penalty,
    lm_outputs,
    load_balancing_loss,
    router_penalty,
    router_z_loss,
)
from moellava.model.language_model.router_weights import load_router, write_router
from moellava.model.language_model.upcycling import (
    layers_with_differing_experts,
    moe_config_from_dense,
    to_dense,
    upcycle,
    upcycled_state_dict,
)

AutoConfig.register(LlamaMoeConfig.model_type, LlamaMoeConfig, exist_ok=True)
AutoModel.register(LlamaMoeConfig, LlamaMoeModel, exist_ok=True)
AutoModelForCausalLM.register(LlamaMoeConfig, LlamaMoeForCausalLM, exist_ok=True)

__all__ = [
    "LlamaMoeConfig",
    "LlamaMoeForCausalLM",
    "LlamaMoeModel",
    "LlamaMoePreTrainedModel",
    "add_router_losses",
    "dense_state_dict",
    "expert_load",
    "has_router_penalty",
    "import_mixture",
    "imported_state_dict",
    "layers_with_differing_experts",
    "lm_outputs",
    "load_balancing_loss",
    "load_router",
    "moe_config_from_dense",
    "read_state_dict",
    "router_penalty",
    "router_z_loss",
    "to_dense",
    "upcycle",
    "upcycled_state_dict",
    "write_router",
]
