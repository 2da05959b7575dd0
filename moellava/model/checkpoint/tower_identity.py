"""Which patch tokens a projector has learned to read.

| name | what it is |
|---|---|
| `TowerIdentity` | the tower, its layer and its weights |
| `tower_identity` | that of a loaded tower |
| `weights_fingerprint` | a hash that tells weights apart |
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class TowerIdentity:
    """Which patch tokens: tower, weights, the layer that is read, their width and number."""

    encoder: str | None = None  # model_type of the tower's config
    tower: str | None = None  # repo id, or a local folder's own name
    revision: str | None = None
    weights: str | None = None  # see `weights_fingerprint`
    select_layer: int | list[int] | tuple[int, ...] | None = None
    hidden_size: int | None = None
    num_patches: int | None = None

    def __str__(self) -> str:
        name = self.tower or "a tower without name"
        name += f"@{self.revision[:7]}" if self.revision else ""
        facts = {
            "encoder": self.encoder,
            "layer": self.select_layer,
            "tokens": self.num_patches,
            "width": self.hidden_size,
            "weights": self.weights and self.weights[:12],
        }
        known = [f"{key} {value}" for key, value in facts.items() if value is not None]
        return f"{name} ({', '.join(known)})"

    def differs_from(self, other: "TowerIdentity") -> list[str]:
        """The fields that are known on both sides and differ.

        If both weights are known, names do not count.
        """
        mine, theirs = asdict(self), asdict(other)
        names = ["encoder", "select_layer", "hidden_size", "num_patches"]
        names += ["weights"] if self.weights and other.weights else ["tower", "revision"]
        if "tower" in names and self.tower and other.tower:
            # A folder's own name stands for the repo id that ends with it.
            mine["tower"], theirs["tower"] = (
                name.rsplit("/", 1)[-1].lower() for name in (self.tower, other.tower)
            )
        known = [name for name in names if mine[name] is not None and theirs[name] is not None]
        return [name for name in known if mine[name] != theirs[name]]


def tower_identity(
    config: PreTrainedConfig, state_dict: Mapping[str, Tensor] | None = None
) -> TowerIdentity:
    """The identity of a vision tower by its config and, if given, by its weights."""
    return TowerIdentity(
        encoder=config.model_type,
        tower=config.tower,
        revision=config.revision,
        weights=weights_fingerprint(state_dict) if state_dict else None,
        select_layer=config.select_layer,
        hidden_size=config.hidden_size,
        num_patches=config.num_patches,
    )


def weights_fingerprint(state_dict: Mapping[str, Tensor]) -> str | None:
    """SHA-256 over names, shapes and the first and last 64 values of each tensor.

    Few values, so that weights which are mapped to a file are not read for it. They are rounded to
    bfloat16, so that a tower has one fingerprint in float32 and bfloat16. float16 rounds otherwise:
    there, and for offloaded weights, it is None, unknown.
    """
    if any(value.dtype == torch.float16 or value.is_meta for value in state_dict.values()):
        return None
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        values = state_dict[name].detach().reshape(-1)
        sample = torch.cat([values[:64], values[-64:]]).to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(state_dict[name].shape)}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()
