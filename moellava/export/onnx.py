"""An image tower and a projector of ours → ONNX graphs with a dynamic number of images.

    B images, N patches, D width of a patch token, M image embeddings per image

export_onnx      a saved model, or a tower alone
write_graph      one module
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel
from typing_extensions import Unpack

from moellava.encoders import VisionEncoder, create_encoder
from moellava.model.checkpoint.configs import load_model_config
from moellava.model.checkpoint.difference import is_trainable_folder
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model.checkpoint import CheckpointReader
from moellava.model.modeling_moellava import PROJECTOR_PREFIX, TOWER_PREFIX
from moellava.model.projector import build_projector
from moellava.storage.errors import reason_of
from moellava.storage.sources import HubKeywords, HubOptions, find_file, parse_source, read_json
from moellava.storage.weights import assign_weights
from moellava.storage.writing import replacing

TOWER_FILE, PROJECTOR_FILE = "vision_tower.onnx", "projector.onnx"
LARGEST_DIFFERENCE = 1e-4  # of an output from torch's, relative to the largest value
MOST_BYTES = 2**31 - 2**20  # of a protobuf message, which an ONNX file is
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """What was written, and how far onnxruntime's outputs are from torch's."""

    folder: Path
    differences: dict[str, float]  # file to the largest, relative to the largest value


def export_onnx(
    source: str | os.PathLike[str], out: str | os.PathLike[str], **hub: Unpack[HubKeywords]
) -> OnnxExport:
    """Write the image side of a saved model, or a tower, in float32, and check it in onnxruntime.

    `vision_tower.onnx` takes `pixel_values` (B, 3, H, W) and gives `patch_tokens` (B, N, D), those
    of the layer that the config selects; `projector.onnx` takes these and gives `image_embeds`
    (B, M, D_text). The image processor's settings lie beside them.

    Args:
        source: folder or hub id of a joined model, or of a tower, as `create_encoder` takes it.
        out: a folder that does not exist or is empty.

    Raises:
        ImportError: the packages of the extra `onnx` are missing.
        ValueError: a part cannot be exported, or its graph computes something else; it is named.
        OSError: if there is no such checkpoint, or `out` holds something.
    """
    _require_packages()
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; give another folder, or empty it.")
    encoder, projector = _load_parts(source, HubOptions(**hub))
    out.mkdir(parents=True, exist_ok=True)
    height, width = encoder.config.image_hw
    differences = {
        TOWER_FILE: write_graph(
            _Tower(encoder),
            torch.randn(3, 3, height, width),
            out / TOWER_FILE,
            names=("pixel_values", "patch_tokens"),
        )
    }
    if projector is not None:
        differences[PROJECTOR_FILE] = write_graph(
            projector,
            torch.randn(3, encoder.num_patches, encoder.hidden_size),
            out / PROJECTOR_FILE,
            names=("patch_tokens", "image_embeds"),
        )
    encoder.image_processor.save_pretrained(out)
    return OnnxExport(folder=out, differences=differences)


def write_graph(module: nn.Module, example: Tensor, path: Path, *, names: tuple[str, str]) -> float:
    """Write one module as a graph whose first dimension is dynamic, and compare it with torch.

    Args:
        example: at least three rows: two are traced, all are compared.
        names: of the graph's input and of its output.

    Returns:
        The largest difference of onnxruntime's output from torch's, over the largest value.

    Raises:
        ValueError: torch cannot export the module, or the difference is beyond 1e-4; nothing is
            written.
    """
    module = module.eval()
    label = f"{path.stem} ({_class_name(module)})"
    size = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    if size > MOST_BYTES:
        raise ValueError(
            f"{label} has {size:,} bytes of weights, and an ONNX file holds less than 2 GiB."
        )
    try:
        program = torch.onnx.export(
            module,
            (example[:2],),
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes=({0: torch.export.Dim("images")},),
            verbose=False,
        )
    except (RuntimeError, NotImplementedError) as error:  # OnnxExporterError is a RuntimeError
        raise ValueError(
            f"{label} cannot be exported to ONNX: {reason_of(error.__cause__ or error)} Run it "
            "with moellava, or choose another tower or projector."
        ) from error
    assert program is not None  # it is when no file is named
    with torch.no_grad():
        expected = module(example)
    with replacing(path) as part:
        program.save(part, external_data=False)
        difference = _difference(_run(part, example, label), expected)
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{label}: onnxruntime's output differs from torch's by {difference:.1e} of the "
                f"largest value; expected at most {LARGEST_DIFFERENCE:.0e}."
            )
    return difference


class _Tower(nn.Module):
    """An encoder that returns a tensor: graphs have no output classes."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(pixel_values).patch_tokens
        return tokens


def _class_name(module: nn.Module) -> str:
    return type(module.encoder if isinstance(module, _Tower) else module).__name__


def _run(path: Path, example: Tensor, label: str) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    if isinstance(given.shape[0], int):
        raise ValueError(
            f"{label} cannot be exported to ONNX: its graph takes {given.shape[0]} images and no "
            "other number. Run it with moellava, or choose another tower or projector."
        )
    output: Tensor = torch.from_numpy(session.run(None, {given.name: example.numpy()})[0])
    return output


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    return float((found - expected).abs().max() / expected.abs().max())


def _require_packages() -> None:
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ImportError(
            f"The export to ONNX needs {' and '.join(missing)}: pip install 'moellava[onnx]'."
        )


def _load_parts(
    source: str | os.PathLike[str], hub: HubOptions
) -> tuple[VisionEncoder, nn.Module | None]:
    """The tower and, of a joined model, the projector, in float32; the language model is not read.

    Raises:
        ValueError: a difference from a base, or weights that do not fit.
    """
    if is_trainable_folder(source):
        raise ValueError(
            f"{source} holds a difference from its base, not a whole model. Save the whole one "
            "first: load_pretrained_model(folder), then save_pretrained of model and processor."
        )
    config_file = find_file(parse_source(source, hub), "config.json", download=True, required=False)
    if config_file is None or read_json(config_file).get("model_type") != MoeLlavaConfig.model_type:
        encoder = create_encoder(None, str(source), dtype="float32", **hub.keywords)
        return encoder, None
    config = load_model_config(str(source), **hub.keywords)
    assert isinstance(config, MoeLlavaConfig)
    tower: VisionEncoder = AutoModel.from_config(config.vision_config, dtype=torch.float32)
    projector = build_projector(
        config.projector_type, config.projector_shape, config.projector_options
    )
    reader = CheckpointReader(source, hub)
    for module, prefix in ((tower, TOWER_PREFIX), (projector, PROJECTOR_PREFIX)):
        state = {
            name.removeprefix(prefix): reader.read(name, torch.float32)
            for name in reader.names()
            if name.startswith(prefix)
        }
        assign_weights(module, state, where=reader.source)
    return tower, projector
