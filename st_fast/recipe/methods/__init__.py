"""Settings of the supervision methods, by the name that a stage's `supervision` key takes. Imports no torch.

A method's settings are one file here; its code is the class named in `implementation`, imported only when a stage
starts. What a method costs is declared with its settings: its heads' linear layers, its teacher's passes and the
activations that it keeps (see `cost`).
"""

from st_fast.recipe.methods.base import EVERYWHERE, Mask, Method, Plain, Selection, projector
from st_fast.recipe.methods.dispersive import Dispersive
from st_fast.recipe.methods.given import Given
from st_fast.recipe.methods.internal_guidance import InternalGuidance
from st_fast.recipe.methods.layer_sync import LayerSync
from st_fast.recipe.methods.repa import CONVOLUTION, DINOV2, Repa, dinov2_size, encoder_width
from st_fast.recipe.methods.self_flow import SelfFlow
from st_fast.recipe.methods.self_transcendence import SelfTranscendence
from st_fast.recipe.methods.sra import SelfRepresentation
from st_fast.recipe.methods.sra2 import Sra2
from st_fast.recipe.methods.sra_dual import DualTime
from st_fast.recipe.methods.velocity_head import VelocityHead

__all__ = [
    "CONVOLUTION", "DINOV2", "EVERYWHERE", "METHODS", "Dispersive", "DualTime", "Given", "InternalGuidance",
    "LayerSync", "Mask", "Method", "Plain", "Repa", "Selection", "SelfFlow", "SelfRepresentation", "SelfTranscendence",
    "Sra2", "VelocityHead", "dinov2_size", "encoder_width", "projector",
    "supervision_name",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    "none": Plain,
    "velocity_head": VelocityHead,
    "self_transcendence": SelfTranscendence,
    "layer_sync": LayerSync,
    "sra": SelfRepresentation,
    "sra2": Sra2,
    "sra_dual": DualTime,
    "self_flow": SelfFlow,
    "repa": Repa,
    "internal_guidance": InternalGuidance,
    "dispersive": Dispersive,
    "given": Given,
}


def supervision_name(method: Method) -> str:
    """The name that a stage's `supervision` key takes for this method; KeyError where it is not registered."""
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise KeyError(f"{type(method).__name__} is not in METHODS; it has {', '.join(METHODS)}")
