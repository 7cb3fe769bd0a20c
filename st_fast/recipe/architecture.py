"""The network's architecture, declared once: the keys of [model], the linear layers that follow, and what must hold.

Parameters, FLOPs and memory (`cost`), config.json, a checkpoint's manifest and the comparison with a teacher all read
it from here; `st_fast.model.sit` and `st_fast.model.mmdit` build it. Imports no torch.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from st_fast.core.options import ARCHITECTURE_MOST as MOST
from st_fast.recipe.error import show, wrong_value
from st_fast.recipe.keys import BelowOne, Limit, NamesOrNone, between, fixed, free, keys
from st_fast.recipe.sizes import named_sizes

TIME_FREQUENCIES = 256
"""Sinusoids of the time embedding."""
INTERNAL = -1
"""A tap: the velocity that the internal head predicts (B, C, H, W), in place of a block's stream."""
CLASSES_MOST = MOST["num_classes"]
PARAMETERS_MOST = 10**12
"""Far above any model of this kind: more is a slip of the keyboard, and would be allocated for hours."""


Counted = Annotated[int, between(0, 10**18)]
"""Of a module of one's own."""
LatentSide = Annotated[int, between(1, MOST["latent_size"])]
LatentSize = LatentSide | tuple[LatentSide, LatentSide]
"""Of a square, or height and width."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, by the name that its weights have (in a block: within the block)."""

    name: str
    inputs: int
    outputs: int
    rows: int = 1
    """Vectors that pass through it for one image: one a token, or one for the whole image."""
    bias: bool = True

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias

    @property
    def macs(self) -> int:
        """Multiply-adds of one image's forward."""
        return self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class Model:
    """The network: by a `name` such as "SiT-XL/2" or "MMDiT-24/2", or by network, depth, width, heads and patch."""

    # A name's sizes are compared themselves.
    name: str = free("custom", 'A published size such as "SiT-XL/2", or "custom" with `network` and the next 4 keys.')
    depth: Annotated[int, between(0, MOST["depth"])] = fixed(0, "Transformer blocks.")
    width: Annotated[int, between(0, MOST["width"])] = fixed(0, "Channels of a token.")
    heads: Annotated[int, between(0, MOST["heads"])] = fixed(0, "Attention heads.")
    patch: Annotated[int, between(0, MOST["patch"])] = fixed(
        0, "Side of the square of latent pixels that makes a token."
    )
    channels: Annotated[int, between(1, MOST["channels"])] = fixed(4, "Channels of a latent.")
    latent_size: LatentSize = fixed(32, "Side of a latent, or its [height, width].")
    num_classes: Annotated[int, between(1, CLASSES_MOST)] = fixed(1000, "Classes of the labels.")
    class_dropout: BelowOne = fixed(
        0.1, "Share of labels, or captions, that training replaces by the null label or caption, for guidance."
    )
    network: Literal["sit", "mmdit", "own"] = fixed(
        "sit", "SiT, conditional on classes, MMDiT, on text, or a module of your own, from Python (docs/python.md)."
    )
    text_width: Annotated[int, between(0, MOST["width"])] = fixed(0, "W, channels of a text token's state (MMDiT).")
    text_length: Annotated[int, between(0, MOST["text_length"])] = fixed(0, "L, tokens of a caption (MMDiT).")
    mlp_ratio: Annotated[float, Limit("above 0 and at most 1000", lambda ratio: 0 < ratio <= 1000)] = fixed(
        4.0, "Hidden channels of the MLP over width; with swiglu 2/3 of that, which makes about as many weights."
    )
    mlp: Literal["gelu", "swiglu", "relu2"] = fixed(
        "gelu", "The MLP's activation: GELU, SiLU of a gate times a value, or the square of ReLU."
    )
    norm: Literal["layer", "rms", "rms_affine"] = fixed(
        "layer", "Normalisation before each modulation: LayerNorm, RMSNorm, or RMSNorm with a weight (LightningDiT's)."
    )
    position: Literal["sincos", "rope", "both"] = fixed(
        "sincos", "Where tokens are: fixed sin-cos added to them, axial 2-D RoPE of queries and keys, or both."
    )
    qk_norm: bool | Literal["off", "layer", "rms"] = fixed(
        True, "Normalise queries and keys within each head: by LayerNorm (true, or layer), RMSNorm, or not at all."
    )
    qkv_bias: bool = fixed(True, "The projection to queries, keys and values has a bias.")
    value_residual: bool = fixed(
        False, "Every block's values are mixed with the first block's, in a share that it learns (arXiv 2410.17897)."
    )
    registers: Annotated[int, between(0, MOST["registers"])] = fixed(
        0, "Learned tokens beside the image's, which no output is read from (arXiv 2309.16588)."
    )
    zero_init: bool = fixed(
        True, "Modulations and the final layer start at zero, as SiT's do and published MMDiT's not."
    )
    prediction: Literal["velocity", "x"] = fixed(
        "velocity", "The output is the velocity, or the clean latent x, of which it follows (JiT's, for pixels)."
    )
    internal_head: Annotated[int, between(0, MOST["depth"])] = fixed(
        0, "The block that a second final layer reads, which predicts the velocity too (Internal Guidance); 0: none."
    )
    fusion_first: Annotated[int, between(0, MOST["depth"])] = fixed(
        0, "Blocks before those that a fusion surrounds (SPRINT); stages with such a route set it."
    )
    fusion_last: Annotated[int, between(0, MOST["depth"])] = fixed(
        0, "The last of the surrounded blocks, whose output is joined with the stream before them; 0: no fusion."
    )
    own_blocks: NamesOrNone = fixed((), "Of your own module, written by st_fast: the blocks that are read.")
    own_macs: tuple[Counted, ...] = free(
        (), "Also: multiply-adds of an image's forward up to each of them, and of all."
    )
    own_parameters: Counted = fixed(0, "Also: its parameters.")
    own_bytes: Counted = free(0, "Also: bytes that an image's forward keeps for the backward, in float32.")
    attention: str = free("auto", 'Attention backend; "auto": the first that is right on the device.')
    modulation: Literal["per_block", "one"] = free("per_block", "Project adaLN's vectors in each block, or at once.")

    @property
    def by_class(self) -> bool:
        """Whether the network is conditional on class labels."""
        return self.network != "mmdit"

    @property
    def latent_sides(self) -> tuple[int, int]:
        """(H, W) of a latent."""
        return self.latent_size if isinstance(self.latent_size, tuple) else (self.latent_size, self.latent_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.channels, *self.latent_sides

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of a latent's patches."""
        height, width = self.latent_sides
        return height // self.patch, width // self.patch

    @property
    def tokens(self) -> int:
        """N, tokens of a latent."""
        rows, columns = self.grid
        return rows * columns

    @property
    def hidden(self) -> int:
        """Channels inside the MLP: of swiglu int(2/3·int(width·ratio)), as LightningDiT has it."""
        hidden = int(self.width * self.mlp_ratio)
        return int(2 / 3 * hidden) if self.mlp == "swiglu" else hidden

    @property
    def head(self) -> int:
        """d, channels of a head."""
        return self.width // self.heads

    @property
    def rope(self) -> bool:
        """Whether queries and keys are rotated by their token's place."""
        return self.position != "sincos"

    @property
    def patch_values(self) -> int:
        """p·p·C, numbers in a patch."""
        return self.patch**2 * self.channels

    @property
    def length(self) -> int:
        """Tokens that the attention sees: an image's with the registers, and a caption's where they are joined."""
        return self.tokens + self.registers + self.text_length

    @property
    def streams(self) -> tuple[tuple[str, int], ...]:
        """The residual streams of a block: how the names of its layers begin, and tokens. The image's comes first."""
        image = self.tokens + self.registers
        if self.network == "sit":
            return (("", image),)
        return ("x_block.", image), ("context_block.", self.text_length)

    def block_layers(self, ends: bool = False, tokens: int | None = None) -> tuple[Layer, ...]:
        """The linear layers of one block; `ends`: of the last one that runs, where the text's stream ends.

        tokens: of the image, where not all run.
        """
        (image, whole), *text = self.streams
        layers = self._stream_layers(image, whole if tokens is None else tokens)
        for stream in text:
            layers += self._ending_layers(*stream) if ends else self._stream_layers(*stream)
        return layers

    def _stream_layers(self, prefix: str, tokens: int) -> tuple[Layer, ...]:
        d, hidden = self.width, self.hidden
        names, inner = (("w12", "w3"), 2 * hidden) if self.mlp == "swiglu" else (("fc1", "fc2"), hidden)
        return (
            Layer(f"{prefix}attn.qkv", d, 3 * d, tokens, self.qkv_bias),
            Layer(f"{prefix}attn.proj", d, d, tokens),
            Layer(f"{prefix}mlp.{names[0]}", d, inner, tokens),
            Layer(f"{prefix}mlp.{names[1]}", hidden, d, tokens),
            Layer(f"{prefix}adaLN_modulation.1", d, 6 * d),
        )

    def _ending_layers(self, prefix: str, tokens: int) -> tuple[Layer, ...]:
        """Of a stream that gives the attention its inputs and ends there."""
        qkv = Layer(f"{prefix}attn.qkv", self.width, 3 * self.width, tokens, self.qkv_bias)
        return qkv, Layer(f"{prefix}adaLN_modulation.1", self.width, 2 * self.width)

    @property
    def embedders(self) -> tuple[Layer, ...]:
        """The linear layers before the blocks."""
        n, d = self.tokens, self.width
        layers = (
            Layer("x_embedder.proj", self.patch_values, d, n),
            Layer("t_embedder.mlp.0", TIME_FREQUENCIES, d),
            Layer("t_embedder.mlp.2", d, d),
        )
        text = (Layer("context_embedder", self.text_width, d, self.text_length),)
        return layers if self.network == "sit" else layers + text

    @property
    def final_layers(self) -> tuple[Layer, ...]:
        """The linear layers after the blocks."""
        return self._final_layers("final_layer")

    @property
    def internal_layers(self) -> tuple[Layer, ...]:
        """The linear layers of the internal head, where there is one."""
        return self._final_layers("final_layer_xr") if self.internal_head else ()

    @property
    def fusion_layers(self) -> tuple[Layer, ...]:
        """The linear layer that joins a deep block's output with a shallow one's, where there is one."""
        return (
            (Layer("fusion_proj", 2 * self.width, self.width, self.tokens + self.registers),)
            if self.fusion_last
            else ()
        )

    def _final_layers(self, name: str) -> tuple[Layer, ...]:
        d = self.width
        return Layer(f"{name}.linear", d, self.patch_values, self.tokens), Layer(f"{name}.adaLN_modulation.1", d, 2 * d)

    @property
    def attention_macs(self) -> int:
        """Multiply-adds of one block's q·kᵀ and softmax·v for one image."""
        return 2 * self.length**2 * self.width

    @property
    def parameters(self) -> int:
        """Parameters, fixed positions included, as the published counts have them."""
        if self.network == "own":
            return self.own_parameters
        # Weights beside the linear layers': of norms, of the text's last of which there is one less, and of the mixing
        # of values in all blocks but the first.
        vectors = {False: 0, True: 4, "rms": 2}[self.qk_norm] * self.head * len(self.streams)
        weight = self.width if self.norm == "rms_affine" else 0
        norms = [vectors + 2 * weight * len(self.streams), vectors + weight * (3 if len(self.streams) > 1 else 2)]
        blocks = [sum(layer.parameters for layer in self.block_layers(end)) + norms[end] for end in (False, True)]
        mixing = (self.depth - 1) * self.value_residual
        others = *self.embedders, *self.final_layers, *self.internal_layers, *self.fusion_layers
        ends = sum(layer.parameters for layer in others) + (self.width if self.fusion_last else 0)  # the mask token
        ends += weight * (2 if self.internal_head else 1) + self.registers * self.width + mixing
        constants = self.tokens * self.width if self.position != "rope" else 0
        if self.network == "sit":
            constants += (self.num_classes + (self.class_dropout > 0)) * self.width
        else:
            constants += self.text_length * self.text_width  # the empty caption's states
        return (self.depth - 1) * blocks[0] + blocks[1] + ends + constants

    def described(self) -> dict[str, Any]:
        """The keys that describe the network, and not how it is computed, for config.json."""
        idle = IDLE[self.network]
        described = {name for name, key in keys(Model).items() if name == "name" or not key.free}
        # Which older versions do not know.
        described -= {name for name in LATER if getattr(self, name) == keys(Model)[name].default}
        return {name: getattr(self, name) for name in keys(Model) if name in described - idle}

    def architecture(self) -> dict[str, Any]:
        """The keys that a trained model's weights depend on, for a checkpoint's manifest: neither name nor training.

        As JSON has them: height and width are a list.
        """
        told = {name: value for name, value in self.described().items() if name not in ("name", "class_dropout")}
        return {name: _as_json(value) for name, value in told.items()}

    def differences(self, theirs: Mapping[str, Any], but: Container[str] = ()) -> list[str]:
        """In what another architecture differs, but for these keys; one that it lacks, being older, has its default."""
        ours = {name: value for name, value in self.architecture().items() if name not in but}
        ours |= {name: _as_json(getattr(self, name)) for name in LATER if name not in but}
        pairs = {name: (theirs.get(name, _as_json(keys(Model)[name].default)), value) for name, value in ours.items()}
        return [f"{name} {old} (this recipe: {ours})" for name, (old, ours) in pairs.items() if old != ours]


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


LATER = (
    "prediction", "internal_head", "fusion_first", "fusion_last", "mlp", "norm", "position", "qkv_bias",
    "value_residual", "registers", "own_blocks", "own_parameters",
)  # fmt: skip
"""Keys that came later: where they have their default they are not written, so that older versions read the rest."""
PARTS: dict[str, tuple[str, ...]] = {
    "latent_size": ("pos_embed",), "prediction": ("final_layer.",), "internal_head": ("final_layer_xr.",),
    "fusion_first": ("fusion_proj.", "mask_token"), "fusion_last": ("fusion_proj.", "mask_token"), "num_classes": (),
    "text_length": (), "mlp_ratio": (), "channels": ("x_embedder.", "final_layer."),
    "patch": ("x_embedder.", "final_layer."), "text_width": ("context_embedder.",),
}  # fmt: skip
"""Keys that speak of some of the weights alone, by how their names begin; of none where shapes tell all there is."""
IDLE: dict[str, set[str]] = {
    "sit": {"network", "text_width", "text_length", "zero_init"},
    "mmdit": {"num_classes", "zero_init"},
    "own": {"heads", "text_width", "text_length", "mlp_ratio", "qk_norm", "zero_init"},
}
"""The keys that say nothing of a network's weights: another's, or how training begins. Without `network` it is SiT."""


def ratio_of(hidden: int, width: int, mlp: str = "gelu") -> float:
    """The smallest `mlp_ratio` with which an MLP of this width has so many hidden channels."""
    if mlp == "swiglu":
        hidden = next(whole for whole in range(hidden, 2 * hidden + 3) if int(2 / 3 * whole) >= hidden)
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def resolve_model(model: Model) -> Model:
    """The model with its sizes filled from a name such as "SiT-XL/2" or "MMDiT-24/2"; those given must agree.

    The size of a square latent becomes one number, and qk_norm's "off" and "layer" what older versions know, however
    they were given.
    """
    words: dict[object, Any] = {"off": False, "layer": True}
    model = replace(model, qk_norm=words.get(model.qk_norm, model.qk_norm))
    height, width = model.latent_sides
    if height == width:
        model = replace(model, latent_size=height)
    if model.network == "own":  # its module tells the rest
        return replace(model, heads=1, patch=model.patch or 1)
    if model.name == "custom":
        for key in ("depth", "width", "heads", "patch"):
            if getattr(model, key) == 0:
                why = 'model.name = "custom" leaves it to you'
                raise wrong_value(f"model.{key}", 0, "an integer at least 1, or a model.name such as SiT-XL/2", why)
        return model
    sizes = named_sizes(model.name)
    for key, size in sizes.items():
        if getattr(model, key) not in (keys(Model)[key].default, size):
            why = f'model.name = "{model.name}" has {key} {size}'
            raise wrong_value(f"model.{key}", getattr(model, key), f'{size}, or model.name = "custom"', why)
    return replace(model, **sizes)


def check_shapes(model: Model) -> None:
    """Latents must divide into patches, width into heads and into the four quarters of a 2-D sin-cos position.

    A network has the keys of its own condition and no others. A module of one's own has shapes of its own.
    """
    if model.network == "own":
        return
    for key in ("text_width", "text_length"):
        value, wanted = getattr(model, key), model.network == "mmdit"
        if (value > 0) != wanted:
            allowed = "an integer at least 1, as the data's text states have it" if wanted else "0, or left out"
            raise wrong_value(f"model.{key}", value, allowed, f'model.network = "{model.network}"')
    named = ", ".join(f"{key} {getattr(model, key)}" for key in ("latent_size", "patch", "channels", "width", "heads"))
    for key, sizes, divisor, of in (
        ("latent_size", model.latent_sides, model.patch, "patch"),
        ("width", (model.width,), model.heads, "heads"),
        ("width", (model.width,), 4, "4, which 2-D sin-cos positions need"),
    ):
        if any(size % divisor for size in sizes):
            value, each = getattr(model, key), "each " * (len(set(sizes)) > 1)
            why = f"not divisible by {of} ({named})"
            raise wrong_value(f"model.{key}", value, f"{each}a multiple of {divisor}", why)
    if model.rope and model.head % 4:
        why = f"RoPE turns pairs of channels, half of a head's for each axis ({named})"
        raise wrong_value("model.heads", model.heads, "such that width / heads is a multiple of 4", why)
    if model.value_residual and model.depth < 2:
        raise wrong_value("model.value_residual", True, "false", f"depth = {model.depth}: no block follows the first")
    for key in ("value_residual", "registers"):
        if getattr(model, key) and model.network != "sit":
            off = show(type(getattr(model, key))())
            raise wrong_value(f"model.{key}", getattr(model, key), off, 'model.network = "mmdit" has none')
    if model.internal_head > model.depth:
        allowed = f"0 (none) or 1 to {model.depth}, the model's blocks"
        raise wrong_value("model.internal_head", model.internal_head, allowed)
    first, last = model.fusion_first, model.fusion_last
    if (first, last) != (0, 0) and (model.network != "sit" or not 1 <= first < last < model.depth):
        why = f"fusion_first = {first}, depth = {model.depth}, network = {show(model.network)}"
        allowed = "1 <= fusion_first < fusion_last < depth of a SiT, or both 0"
        raise wrong_value("model.fusion_last", last, allowed, why)
    if model.hidden < 1:
        raise wrong_value("model.mlp_ratio", model.mlp_ratio, f"at least 1 / model.width = {1 / model.width:g}")
    if model.parameters > PARAMETERS_MOST:
        named = ", ".join(f"{key} {getattr(model, key)}" for key in ("depth", "width", "num_classes", "mlp_ratio"))
        why = f"with {named} there are {model.parameters:.2g} parameters"
        raise wrong_value("model.width", model.width, f"at most {PARAMETERS_MOST:.0e} parameters", why)
