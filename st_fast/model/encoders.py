"""Frozen image encoders whose patch features supervise (REPA, arXiv 2410.06940), and what they see of an image.

`ImageEncoder` is all that the rest of the program knows of one. `load_encoder` gives whatever stands in `ENCODERS`, and
vision transformers through transformers: DINOv2 with and without registers, CLIP, MAE, I-JEPA. What differs between
these is a line in `FAMILIES`, by the `model_type` that a model's configuration names.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.core.errors import UserError, how_to_install
from st_fast.core.files import read_header, read_json
from st_fast.model.finite import check_finite
from st_fast.model.vae import from_hub, vae_hash
from st_fast.recipe.cost import vision_flops


class ImageEncoder(Protocol):
    """Turns images into a grid of patch features."""

    name: str
    """As the recipe and the folder of features name it: a hub name or a folder's."""
    hash: str
    """SHA-256 of the weights."""
    width: int
    """Channels of a feature."""

    def grid(self, size: int) -> tuple[int, int]:
        """(h, w) of the features of images of size × size pixels; UserError where that can't be."""
        ...

    def flops(self, size: int) -> float:
        """FLOPs of one image's forward."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (n, 1 or 3, S, S) → (n, h, w, width) float32 on the encoder's device, without gradient."""
        ...


@dataclass(frozen=True)
class Statistics:
    """What pixels are normalised with: mean and standard deviation of RGB in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
AT_ONCE = 32
"""Images that are in float64 at the same time: a batch of 256 would take gigabytes."""


def preprocess(
    images: Tensor, side: int, dtype: torch.dtype = torch.float32, statistics: Statistics = IMAGENET
) -> Tensor:
    """uint8 (n, 1 or 3, S, S) → (n, 3, side, side): to [0, 1], normalised, then bicubic where S is another side.

    Bicubic (Keys' kernel, a = −0.75) without antialiasing, as the published code has it; whether pixels are normalised
    before or after makes no difference, since the kernel's weights add up to 1. Grey images become three channels.
    """
    return torch.cat([_preprocess(part, side, statistics).to(dtype) for part in images.split(AT_ONCE)])


def _preprocess(images: Tensor, side: int, statistics: Statistics) -> Tensor:
    # In float64: float32 would place the pixels of a large image by 1e-5 of a pixel wrongly.
    pixels = images.expand(-1, 3, -1, -1).double() / 255
    normal = [(pixels[:, c] - statistics.mean[c]) / statistics.std[c] for c in range(3)]  # numbers wait for no device
    pixels = torch.stack(normal, dim=1)
    if side != images.shape[-1]:
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
    return pixels


def input_side(size: int, patch: int) -> int:
    """Pixels a side that an encoder with patches of `patch` pixels sees of images of `size`.

    Patches of 14 (or 7): 224·(size/256), so that a patch covers as many pixels of the image as a token of a latent
    model with patch 2; patches of 16 cover that of the image as it is. So the released code has it for DINOv2, CLIP
    and I-JEPA (14) and for MAE (16).
    """
    if patch % 7:
        return size
    if size % 8:
        raise UserError(f"images of {size} pixels: an encoder sees 7/8 of them a side; a multiple of 8 is needed")
    return size * 7 // 8


@dataclass(frozen=True)
class Family:
    """What must be known of one architecture to read its patch tokens."""

    model: str
    """Its class in transformers."""
    prefix: Callable[[Any], int] = lambda config: 1
    """Tokens before the patches', by the model's configuration: class token and registers."""
    statistics: Statistics = IMAGENET
    keeps_order: bool = True
    """False where the model shuffles its patches unless it is told not to."""
    resizes: bool = True
    """Whether its forward has to be allowed to take another size than the one it was trained with."""
    last_norm: str = ""
    """A final LayerNorm that is left out, as in the published code."""


FAMILIES = {
    "dinov2": Family("Dinov2Model", resizes=False),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", lambda config: 1 + config.num_register_tokens, resizes=False
    ),
    "clip": Family("CLIPVisionModel", statistics=CLIP),
    "clip_vision_model": Family("CLIPVisionModel", statistics=CLIP),
    "vit_mae": Family("ViTMAEModel", keeps_order=False, last_norm="layernorm"),
    "ijepa": Family("IJepaModel", lambda config: 0),
}
"""The patch tokens are those after the last LayerNorm; CLIP's and MAE's before it, as REPA's released code has them."""

NOT_USED = ("mask_token", "pooler", "pooling")
"""Weights that a file may lack: patch tokens don't depend on them."""


class PatchTokens(nn.Module):
    """A model's patch tokens: pixels (n, 3, side, side) → (n, N, D)."""

    def __init__(self, model: Any, family: Family) -> None:
        super().__init__()
        self.model, self.family, self.prefix = model, family, family.prefix(model.config)
        if family.last_norm:
            setattr(model, family.last_norm, nn.Identity())

    def forward(self, pixels: Tensor) -> Tensor:
        options: dict[str, Any] = {"interpolate_pos_encoding": True} if self.family.resizes else {}
        if not self.family.keeps_order:  # MAE sorts its patches by this
            patches = (pixels.shape[-1] // self.model.config.patch_size) ** 2
            options["noise"] = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        tokens: Tensor = self.model(pixel_values=pixels, **options).last_hidden_state
        return tokens[:, self.prefix :]


class VisionTransformer:
    """A frozen vision transformer (see `ImageEncoder`); class and register tokens are dropped."""

    def __init__(self, name: str, model: Any, family: Family, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.hash, self.family = name, vae_hash(model), family
        if not family.keeps_order:
            model.config.mask_ratio = 0.0
        self.tokens = PatchTokens(model, family).to(device, dtype).eval().requires_grad_(False)
        self.device, self.dtype, self.config = device, dtype, model.config
        self.width, self.patch = int(self.config.hidden_size), int(self.config.patch_size)
        self.run: Callable[[nn.Module, Tensor], Any] = lambda tokens, pixels: tokens(pixels)
        """How `tokens` is run; a trainer may put a compiled form here."""
        self._trained = _positions(model).detach().float().cpu()

    def grid(self, size: int) -> tuple[int, int]:
        """(h, w) of the features of images of size × size pixels; UserError where patches don't divide the input."""
        side = input_side(size, self.patch)
        if side % self.patch:
            seen = f"become {side}, no" if side != size else "are no"
            raise UserError(
                f"encoder {self.name}: images of {size} pixels {seen} multiple of its patch of {self.patch}"
            )
        return side // self.patch, side // self.patch

    def flops(self, size: int) -> float:
        """FLOPs of one image's forward: linear layers, attention, patch embedding."""
        config, patches = self.config, self.grid(size)[0] ** 2
        hidden = getattr(config, "intermediate_size", None) or int(self.width * config.mlp_ratio)
        return vision_flops(self.width, config.num_hidden_layers, hidden, self.patch, patches, self.tokens.prefix)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (n, 1 or 3, S, S) → (n, h, w, width) float32 on the encoder's device."""
        height, width = self.grid(images.shape[-1])
        self._fit(height)
        here = images if images.device == self.device else images.to(self.device)
        pixels = preprocess(here, height * self.patch, self.dtype, self.family.statistics)
        tokens: Tensor = self.run(self.tokens, pixels)
        return tokens.float().unflatten(1, (height, width))

    def _fit(self, side: int) -> None:
        """Gives the model positions for side × side patches, if it has others."""
        if len(_positions(self.tokens.model)) in (side * side, side * side + 1):
            return
        _set_positions(self.tokens.model, resample(self._trained, side).to(self.device, self.dtype))


def resample(positions: Tensor, side: int) -> Tensor:
    """Positions (n² or n² + 1, D), the class token's first, → those of side × side patches: bicubic, antialiased.

    As the released code does it once; transformers would do it at every forward, and without antialiasing, which for
    DINOv2 (37 × 37 positions, 16 × 16 needed) gives other features.
    """
    trained = math.isqrt(len(positions))
    special, patches = positions.split([len(positions) - trained**2, trained**2])
    square = patches.T.reshape(1, -1, trained, trained)
    resized = F.interpolate(square, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([special, resized[0].flatten(1).T])


def _embeddings(model: Any) -> Any:
    """The module that adds the positions."""
    return next(m for m in model.modules() if hasattr(m, "position_embeddings") or hasattr(m, "position_embedding"))


def _positions(model: Any) -> Tensor:
    """The table of positions in use, (n² or n² + 1, D)."""
    module = _embeddings(model)
    table: Tensor = (
        module.position_embedding.weight if hasattr(module, "position_embedding") else module.position_embeddings[0]
    )
    return table


def _set_positions(model: Any, table: Tensor) -> None:
    module = _embeddings(model)
    if hasattr(module, "position_embedding"):  # CLIP looks its positions up
        module.position_embedding = nn.Embedding.from_pretrained(table, freeze=True)
        module.position_ids = torch.arange(len(table), device=table.device)[None]
    else:
        module.position_embeddings = nn.Parameter(table[None], requires_grad=False)


def quiet_transformers(wanted: str, install: str = "") -> Any:
    """The transformers package without its progress bars; UserError, naming what is wanted of it, if it is missing."""
    try:
        import transformers
    except ImportError as error:
        remedy = install or how_to_install("repa")
        raise UserError(f"encoder {wanted!r}: transformers can't be imported ({error}): {remedy}") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_transformer(name: str, device: torch.device, dtype: torch.dtype) -> VisionTransformer:
    """A frozen vision transformer from a local folder or a hub name; never unpickles. UserError if it can't be had.

    A file that lacks any weight of the model is refused: transformers would draw it at random.
    """
    transformers = quiet_transformers(name)
    if Path(name).is_dir():
        check_folder(Path(name))
    kinds = "neither a folder with a vision transformer in safetensors, nor a hub name that can be reached"
    with from_hub(f"encoder {name!r}: {kinds}, such as facebook/dinov2-base", name):
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        family = FAMILIES.get(kind)
        model, missing = _from_pretrained(transformers, name, family) if family else (None, [])
    if family is None or model is None:
        raise UserError(f"encoder {name!r}: its model_type is {kind!r}; allowed: {', '.join(FAMILIES)}")
    if missing:
        raise UserError(f"encoder {name!r}: {len(missing)} weights of a {family.model} are missing: {missing[0]}, …")
    check_finite(model.state_dict(), f"encoder {name!r}")
    known = Path(name).resolve().name if Path(name).is_dir() else name
    return VisionTransformer(known, model.float(), family, device, dtype)


def check_folder(folder: Path) -> None:
    """BadFile for a configuration or a header that claims more than may be allocated, before the library reads it."""
    if (config := folder / "config.json").is_file():  # where it is missing, loading says so
        read_json(config)
    for weights in folder.glob("*.safetensors"):
        read_header(weights)


def _from_pretrained(transformers: Any, name: str, family: Family) -> tuple[Any, list[str]]:
    """The model, and the weights that it needs but the file lacks, of which transformers would only print a warning."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        cls = getattr(transformers, family.model)
        model, told = cls.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    finally:
        transformers.utils.logging.set_verbosity(level)
    return model, sorted(key for key in told["missing_keys"] if not any(word in key for word in NOT_USED))


Load = Callable[[torch.device, torch.dtype], ImageEncoder]
ENCODERS: dict[str, Load] = {}
"""Encoders that are neither folders nor on the hub, by the name that recipes give them (docs/methods.md has one)."""


def load_encoder(name: str, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """A frozen encoder: one of `ENCODERS`, a local folder or a hub name. One line of UserError if it can't be had."""
    if name in ENCODERS:
        return ENCODERS[name](device, dtype)
    return load_transformer(name, device, dtype)
