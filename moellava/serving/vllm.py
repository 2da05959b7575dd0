"""The plug-in by which vLLM knows our models: the entry point of the group `vllm.general_plugins`.

vLLM runs a model through its transformers backend if the class that the checkpoint's config names
is an attribute of the transformers package; it then picks the backend for a mixture or for a dense
model by itself. docs/serving.md is the guide.
"""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Make our models attributes of transformers; vLLM calls this in each of its processes.

    vLLM ends if a plug-in raises, whatever model it is about to serve. So where moellava cannot be
    imported, one warning says why.
    """
    import transformers

    try:
        from moellava.model import MoeLlavaForConditionalGeneration
        from moellava.model.language_model import LlamaMoeForCausalLM
    except ImportError as error:
        logger.warning(
            "moellava's models are not known to vLLM: %s. transformers is %s here; docs/serving.md "
            "of moellava says which versions work together.",
            error,
            transformers.__version__,
        )
        return
    for model_class in (MoeLlavaForConditionalGeneration, LlamaMoeForCausalLM):
        setattr(transformers, model_class.__name__, model_class)
