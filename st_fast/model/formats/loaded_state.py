"""The neutral form between layouts: named tensors in our convention of time and sign, and what the file said."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from st_fast.core.latents import LatentSpace
from st_fast.recipe.schema import Model

Table = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoadedState:
    """One model with what belongs to it; every table is {key: float32 tensor}.

    The trunk's keys are the published ones; the heads' are as `head_name` has them, in the same table.
    """

    config: Model
    layout: str
    """Where it comes from: a name of `LAYOUTS`."""
    model: Table
    """The raw weights; the averaged ones again where a file has no raw ones."""
    ema: Table
    """The averaged weights; the raw ones again where a file has no average. May lack the heads."""
    exp_avg: Table = field(default_factory=dict)
    exp_avg_sq: Table = field(default_factory=dict)
    """AdamW's running means for the trained keys; both empty where the file has no optimiser state."""
    momentum_buffer: Table = field(default_factory=dict)
    """Muon's, for the keys that it updates in AdamW's place."""
    updates: int = 0
    """AdamW's count of updates."""
    head_updates: int = 0
    """The same of the heads, which may be younger."""
    step: int = 0
    path: str = "linear"
    """Of the flow: "linear" or "cosine"."""
    latents: LatentSpace | None = None
    """What its latents are of, where that is known."""
    mean_latents: Table = field(default_factory=dict)
    """The data's mean latents (C, H, W), by shape, of a model that was trained with a contrast."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a file of the same layout needs to be written back as it was, as plain JSON values."""
    originals: Table = field(default_factory=dict)
    """Tensors that importing changed or left out, as they were: `<table>/<key>`."""
    left_out: str = ""
    """Why the file's optimiser state was not read, where it has one."""
    remarks: tuple[str, ...] = ()
    """Lines for whoever uses the model: what else of the file was left out."""

    @property
    def averaged(self) -> bool:
        """Whether there is an average beside the raw weights."""
        return any(tensor is not self.model.get(key) for key, tensor in self.ema.items())

    def __post_init__(self) -> None:
        if set(self.exp_avg) != set(self.exp_avg_sq):
            raise ValueError("exp_avg and exp_avg_sq must have the same keys")


NULL_CONTEXT = "null_context"
"""The empty caption's states in an MMDiT of ours. Published files lack them: they come from the data."""
INTERNAL_PREFIX = "final_layer_xr."
"""How the keys of the internal head begin, which Internal Guidance adds to the trunk."""
FUSION = ("fusion_proj.", "mask_token")
"""How the keys of SPRINT's fusion begin, which no published layout of ours has."""
TRUNK = (
    "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.", "pos_embed", NULL_CONTEXT, "blocks.",
    "joint_blocks.", "final_layer.", INTERNAL_PREFIX, *FUSION, "register_tokens",
)  # fmt: skip
"""How the keys of a SiT and of an MMDiT begin."""


def is_head(key: str) -> bool:
    """Whether a key belongs to a training head and not to the trunk."""
    return not key.startswith(TRUNK)


def head_name(key: str) -> str:
    """The name of a head's key in a table: its own, marked where the trunk could have the same one."""
    return key if is_head(key) else f"head:{key}"


def trunk(table: Table) -> dict[str, Tensor]:
    """The part of a table that the network has."""
    return {key: tensor for key, tensor in table.items() if not is_head(key)}


def heads(table: Table) -> dict[str, Tensor]:
    """The part of a table that a supervision's heads have."""
    return {key: tensor for key, tensor in table.items() if is_head(key)}
