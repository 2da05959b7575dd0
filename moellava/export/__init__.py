"""A checkpoint of ours in other runtimes' layouts.

export_mixtral   the language model, for transformers, vLLM and llama.cpp
"""

from moellava.export.mixtral import MixtralExport, export_mixtral

__all__ = ["MixtralExport", "export_mixtral"]
