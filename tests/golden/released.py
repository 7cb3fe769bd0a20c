"""Writes what LightningDiT's and SpeedrunDiT's released networks say: `python -m tests.golden.released FOLDER FOLDER`.

The folders are checkouts of hustvl/LightningDiT and SwayStar123/SpeedrunDiT; einops must be there. Of timm two modules
are written out here, and fairscale, which the networks don't use, is stood in for. Weights are made up by a formula, so
that `released.json` has no more than the names and shapes of the files' tensors and some of the outputs, and ours can
be held to them where no checkout is. Every case is also loaded into ours here, and the largest difference is printed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from st_fast import kernels
from st_fast.model import SiT
from st_fast.model.formats import LoadedState, import_file
from st_fast.model.formats.loaded_state import trunk
from st_fast.model.formats.modern import ANGLES
from st_fast.model.layers import sincos_positions

FILE = Path(__file__).with_name("released.json")
WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 48, 4, 2, 6, 5, 7
GRID = SIDE // PATCH
DEPTHS = {"lightningdit": 2, "speedrundit": 6}
FLAGS = ("use_rope", "use_rmsnorm", "use_qknorm", "use_swiglu")
"""Switches of LightningDiT's options, each of which is tried with every other."""
CASES: dict[str, dict[str, Any]] = {
    " ".join(["lightningdit", *(flag for flag, on in zip(FLAGS, switches, strict=True) if on)]): dict(
        zip(FLAGS, switches, strict=True)
    )
    for switches in itertools.product((False, True), repeat=len(FLAGS))
}
CASES |= {"speedrundit": {"qk_norm": False}, "speedrundit qk_norm": {"qk_norm": True}}
"""By the layout's name and what is switched on."""
EVERY = 17
"""Of an output's numbers, one in so many is kept."""
NORMS = ("norm1.weight", "norm2.weight", "norm_final.weight", "q_norm.weight", "k_norm.weight", "wg_norm.weight")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x (3, C, H, W), t (3,) of ours, and labels, one of them the null label."""
    x = torch.randn(3, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    return x, torch.tensor([0.07, 0.46, 0.91]), torch.tensor([0, 5, CLASSES])


def drawn(key: str, shape: list[int]) -> Tensor:
    """A made-up weight, by its key: activations keep an ordinary size, and no weight is zero or one."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith(NORMS):
        return 1 + 0.3 * noise
    if key.endswith("v1_lambda"):
        return 0.4 + 0.2 * noise
    return noise * (0.3 if noise.ndim < 2 else noise[0].numel() ** -0.5)


def fixed(key: str) -> Tensor | None:
    """A tensor that isn't trained, as a file of either project has it; None of any other key."""
    head = WIDTH // HEADS
    if key == "pos_embed":
        return sincos_positions(WIDTH, (GRID, GRID))
    if key.startswith("feat_rope."):
        steps = 1 / 10_000 ** (torch.arange(0, head // 2, 2) / (head // 2))
        turns = torch.arange(GRID)[:, None] * steps  # (rows or columns, d/4)
        rows, columns = turns[:, None].expand(-1, GRID, -1), turns[None].expand(GRID, -1, -1)
        angles = torch.cat((rows, columns), dim=-1).flatten(0, 1).repeat_interleave(2, dim=1)
        return angles.cos() if key.endswith("cos") else angles.sin()
    return None


def state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The tensors of a case's file, by the names and shapes in `released.json`."""
    found = {}
    for key, shape in shapes.items():
        tensor = fixed(key)
        found[key] = drawn(key, shape) if tensor is None else tensor
        if key == "pos_embed" and shape[1] > GRID**2:  # the class token's is zero
            found[key] = torch.cat((torch.zeros(1, 1, WIDTH), found[key]), dim=1)
    return found


def velocity(loaded: LoadedState, path_drop: bool = False) -> Tensor:
    """What our network says of `inputs`, whose class token is left out."""
    model = SiT(loaded.config, kernels.select({}, torch.device("cpu"))).eval()
    model.load_state_dict(trunk(loaded.ema))
    with torch.no_grad():
        return model.without_path(*inputs()) if path_drop else model(*inputs())[0]


def kept(output: Tensor) -> list[float]:
    """What of an output is written down."""
    return [float(f"{value:.8g}") for value in output.flatten()[::EVERY].tolist()]


class PatchEmbed(nn.Module):
    """timm's, as far as the networks use it."""

    def __init__(self, side: int, patch: int, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (side // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """timm's, as far as the networks use it."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@contextlib.contextmanager
def released(checkout: Path, name: str) -> Iterator[ModuleType]:
    """The module `models.NAME` of a checkout, with what it imports stood in for and nothing compiled."""
    timm = ModuleType("timm.models.vision_transformer")
    timm.PatchEmbed, timm.Mlp = PatchEmbed, Mlp  # type: ignore[attr-defined]
    package = ModuleSpec("models", None, is_package=True)
    package.submodule_search_locations = [str(checkout / "models")]
    others = ("fairscale.nn.model_parallel", "fairscale.nn.model_parallel.initialize",
              "fairscale.nn.model_parallel.layers", "fairscale", "fairscale.nn", "timm", "timm.models")  # fmt: skip
    stand_ins = {other: MagicMock() for other in others} | {timm.__name__: timm}
    stand_ins["models"] = importlib.util.module_from_spec(package)
    with patch.dict(sys.modules, stand_ins), patch.object(torch, "compile", lambda function: function):
        yield importlib.import_module(f"models.{name}")


def network(checkout: Path, case: str) -> nn.Module:
    """The released network of a case, with made-up weights and positions of its own."""
    layout, settings = case.split()[0], CASES[case]
    sizes = {
        "input_size": SIDE, "patch_size": PATCH, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_heads": HEADS,
        "depth": DEPTHS[layout], "num_classes": CLASSES, "mlp_ratio": 3.3,
    }  # fmt: skip
    if layout == "lightningdit":
        with released(checkout, "lightningdit") as module:
            model = module.LightningDiT(**sizes, **settings)
    else:
        with released(checkout, "sit") as module:
            model = module.SiT(**sizes, **settings, decoder_hidden_size=WIDTH, z_dims=[10], projector_dim=20)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    made = {key: drawn(key, list(t.shape)) if key in trained else t for key, t in model.state_dict().items()}
    model.load_state_dict(made)
    return model.eval()


@torch.no_grad()
def said(model: Any, layout: str, path_drop: bool = False) -> Tensor:
    """What it says of `inputs`, in our convention; SpeedrunDiT's blocks are run on the image's tokens alone."""
    x, t, labels = inputs()
    if layout == "lightningdit":
        return -model(x, 1 - t, labels)
    tokens = model.x_embedder(x) + model.pos_embed[:, 1:]
    c, v1, before = model.t_embedder(t) + model.y_embedder(labels, False), None, None
    for number, block in enumerate(model.blocks):
        if number == model.num_f:
            before = tokens
        if number == model.num_f + model.num_g:
            deep = model.mask_token.expand_as(tokens) if path_drop else tokens
            tokens = model._sprint_fuse(before, deep)
        tokens = block(tokens, c, model.feat_rope, v1=v1)
        v1 = block.attn.v_last if v1 is None else v1
    return model.unpatchify(model.final_layer(tokens, c)[0])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one, as a share of the largest output."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    folders = dict(zip(DEPTHS, map(Path, sys.argv[1:3]), strict=True))
    found: dict[str, Any] = {
        f"{layout} commit": subprocess.check_output(["git", "-C", folder, "rev-parse", "HEAD"], text=True).strip()
        for layout, folder in folders.items()
    }
    for case in CASES:
        layout = case.split()[0]
        model = network(folders[layout], case)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), file := Path(folder) / "model.pt")
            loaded = import_file(file, layout, HEADS, CLASSES)
        theirs = said(model, layout)
        shapes = {key: list(t.shape) for key, t in model.state_dict().items()}
        found[case] = record = {"shapes": shapes, "velocity": kept(theirs)}
        # What numbers an optimiser's state is in the order of the file.
        assert [key for key in shapes if key not in ANGLES] == [key for key, _ in model.named_parameters()]
        apart = [difference(velocity(loaded), theirs)]
        if layout == "speedrundit":
            dropped = said(model, layout, path_drop=True)
            record["path_drop"] = kept(dropped)
            apart.append(difference(velocity(loaded, path_drop=True), dropped))
        print(f"{case}: {max(apart):.1e}")
    lines = (f" {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in found.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
