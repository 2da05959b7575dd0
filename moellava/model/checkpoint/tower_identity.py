"""Which patch tokens a projector has learned to read: `TowerIdentity`, `tower_identity`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from moellava.storage.weights import weights_fingerprint


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
