"""A checkpoint of ours in other runtimes' layouts.

export_mixtral   the language model, for transformers, vLLM and llama.cpp
export_onnx      the image tower and the projector, for onnxruntime
"""

from moellava.export.mixtral import MixtralExport, export_mixtral
from moellava.export.onnx import OnnxExport, export_onnx

__all__ = ["MixtralExport", "OnnxExport", "export_mixtral", "export_onnx"]
