"""The network's architecture, declared once: the keys of [model], the linear layers that follow, and what must hold.

Parameters, FLOPs and memory (`cost`), config.json, a checkpoint's manifest and the comparison with a teacher all read
it from here; `st_fast.model.sit` builds it. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from st_fast.core.options import ARCHITECTURE_MOST as MOST
from st_fast.core.options import did_you_mean
from st_fast.recipe.error import wrong_value
from st_fast.recipe.keys import BelowOne, Limit, between, fixed, free, keys

SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
"""SiT's published sizes: (depth, width, heads)."""
PATCHES = (2, 4, 8)
"""The patch sizes that SiT's names take."""
TIME_FREQUENCIES = 256
"""Sinusoids of the time embedding."""
CLASSES_MOST = MOST["num_classes"]
PARAMETERS_MOST = 10**12
"""Far above any model of this kind: more is a slip of the keyboard, and would be allocated for hours."""


@dataclass(frozen=True)
class Layer:
    """A linear layer with a bias, by the name that its weights have (in a block: within the block)."""

    name: str
    inputs: int
    outputs: int
    rows: int = 1
    """Vectors that pass through it for one image: one a token, or one for the whole image."""

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs

    @property
    def macs(self) -> int:
        """Multiply-adds of one image's forward."""
        return self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class Model:
    """The network. `name` such as "SiT-XL/2" sets depth, width, heads and patch; or give these four."""

    # A name's sizes are compared themselves.
    name: str = free("custom", 'A published size such as "SiT-XL/2", or "custom" with the next four keys.')
    depth: Annotated[int, between(0, MOST["depth"])] = fixed(0, "Transformer blocks.")
    width: Annotated[int, between(0, MOST["width"])] = fixed(0, "Channels of a token.")
    heads: Annotated[int, between(0, MOST["heads"])] = fixed(0, "Attention heads.")
    patch: Annotated[int, between(0, MOST["patch"])] = fixed(
        0, "Side of the square of latent pixels that makes a token."
    )
    channels: Annotated[int, between(1, MOST["channels"])] = fixed(4, "Channels of a latent.")
    latent_size: Annotated[int, between(1, MOST["latent_size"])] = fixed(32, "Side of a latent.")
    num_classes: Annotated[int, between(1, CLASSES_MOST)] = fixed(1000, "Classes of the labels.")
    class_dropout: BelowOne = fixed(0.1, "Share of labels that training replaces by the null label, for guidance.")
    mlp_ratio: Annotated[float, Limit("above 0 and at most 1000", lambda ratio: 0 < ratio <= 1000)] = fixed(
        4.0, "Hidden channels of the MLP over width."
    )
    qk_norm: bool = fixed(True, "Normalise queries and keys (LayerNorm within each head).")
    attention: str = free("auto", 'Attention backend; "auto": the first that is right on the device.')
    modulation: Literal["per_block", "one"] = free("per_block", "Project adaLN's vectors in each block, or at once.")

    @property
    def tokens(self) -> int:
        """N, tokens of a latent."""
        return (self.latent_size // self.patch) ** 2

    @property
    def hidden(self) -> int:
        """Channels inside the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def patch_values(self) -> int:
        """p·p·C, numbers in a patch."""
        return self.patch**2 * self.channels

    @property
    def block_layers(self) -> tuple[Layer, ...]:
        """The linear layers of one block; the last one projects its modulation."""
        n, d = self.tokens, self.width
        return (
            Layer("attn.qkv", d, 3 * d, n),
            Layer("attn.proj", d, d, n),
            Layer("mlp.fc1", d, self.hidden, n),
            Layer("mlp.fc2", self.hidden, d, n),
            Layer("adaLN_modulation.1", d, 6 * d),
        )

    @property
    def embedders(self) -> tuple[Layer, ...]:
        """The linear layers before the blocks."""
        n, d = self.tokens, self.width
        time = Layer("t_embedder.mlp.0", TIME_FREQUENCIES, d), Layer("t_embedder.mlp.2", d, d)
        return Layer("x_embedder.proj", self.patch_values, d, n), *time

    @property
    def final_layers(self) -> tuple[Layer, ...]:
        """The linear layers after the blocks."""
        n, d = self.tokens, self.width
        return Layer("final_layer.linear", d, self.patch_values, n), Layer("final_layer.adaLN_modulation.1", d, 2 * d)

    @property
    def attention_macs(self) -> int:
        """Multiply-adds of one block's q·kᵀ and softmax·v for one image."""
        return 2 * self.tokens**2 * self.width

    @property
    def parameters(self) -> int:
        """Parameters, fixed positions included, as the published counts have them."""
        norms = 4 * (self.width // self.heads) if self.qk_norm else 0
        embedded = self.num_classes + (self.class_dropout > 0) + self.tokens  # labels and positions
        block = sum(layer.parameters for layer in self.block_layers) + norms
        ends = sum(layer.parameters for layer in (*self.embedders, *self.final_layers))
        return self.depth * block + ends + embedded * self.width

    def network(self) -> dict[str, Any]:
        """The keys that describe the network, and not how it is computed, for config.json."""
        return {name: getattr(self, name) for name, key in keys(Model).items() if name == "name" or not key.free}

    def architecture(self) -> dict[str, Any]:
        """The keys that a trained model's weights depend on, for a checkpoint's manifest: no dropout and no name."""
        return {name: value for name, value in self.network().items() if name not in ("name", "class_dropout")}

    def differences(self, theirs: Mapping[str, Any]) -> list[str]:
        """In what another architecture differs; a key that it lacks, since it is older, has its default."""
        pairs = {name: (theirs.get(name, keys(Model)[name].default), v) for name, v in self.architecture().items()}
        return [f"{name} {old} (this recipe: {ours})" for name, (old, ours) in pairs.items() if old != ours]


def resolve_model(model: Model) -> Model:
    """The model with depth, width, heads and patch filled from a name such as "SiT-XL/2"; those given must agree."""
    if model.name == "custom":
        for key in ("depth", "width", "heads", "patch"):
            if getattr(model, key) == 0:
                why = 'model.name = "custom" leaves it to you'
                raise wrong_value(f"model.{key}", 0, "an integer at least 1, or a model.name such as SiT-XL/2", why)
        return model
    named = {f"SiT-{size}/{patch}": (*shape, patch) for size, shape in SIZES.items() for patch in PATCHES}
    if model.name not in named:
        options = ["custom", *named]
        raise wrong_value("model.name", model.name, ", ".join(options) + did_you_mean(model.name, options))
    depth, width, heads, patch = named[model.name]
    for key, size in zip(("depth", "width", "heads", "patch"), named[model.name], strict=True):
        if getattr(model, key) not in (0, size):
            why = f'model.name = "{model.name}" has {key} {size}'
            raise wrong_value(f"model.{key}", getattr(model, key), f'{size}, or model.name = "custom"', why)
    return replace(model, depth=depth, width=width, heads=heads, patch=patch)


def check_shapes(model: Model) -> None:
    """Latents must divide into patches, width into heads and into the four quarters of a 2-D sin-cos position."""
    named = ", ".join(f"{key} {getattr(model, key)}" for key in ("latent_size", "patch", "channels", "width", "heads"))
    for key, divisor, of in (
        ("latent_size", model.patch, "patch"),
        ("width", model.heads, "heads"),
        ("width", 4, "4, which 2-D sin-cos positions need"),
    ):
        if (value := getattr(model, key)) % divisor:
            raise wrong_value(f"model.{key}", value, f"a multiple of {divisor}", f"not divisible by {of} ({named})")
    if model.hidden < 1:
        raise wrong_value("model.mlp_ratio", model.mlp_ratio, f"at least 1 / model.width = {1 / model.width:g}")
    if model.parameters > PARAMETERS_MOST:
        named = ", ".join(f"{key} {getattr(model, key)}" for key in ("depth", "width", "num_classes", "mlp_ratio"))
        why = f"with {named} there are {model.parameters:.2g} parameters"
        raise wrong_value("model.width", model.width, f"at most {PARAMETERS_MOST:.0e} parameters", why)
