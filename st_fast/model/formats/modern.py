"""LightningDiT's and SpeedrunDiT's files ↔ ours: what they hold beside a network of ours, and what tells them apart.

Both hold RoPE's angles, which ours computes. SpeedrunDiT's network has REG's class token besides (arXiv 2507.01467): a
token in front of the image's, its projections, and its row of the positions. Ours has no such token.
LightningDiT's time and sign are official SiT's (`official`), SpeedrunDiT's are REPA's, which are ours.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from st_fast.core.checkpoint import match_strictly
from st_fast.core.errors import UserError
from st_fast.model.formats.loaded_state import Table
from st_fast.model.layers import rope_angles
from st_fast.recipe.architecture import Model

LAYOUTS = ("lightningdit", "speedrundit")
SIZES = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "1p0B": (24, 1536, 24), "1p6B": (28, 1792, 28)}
"""LightningDiT's sizes: (depth, width, heads)."""
ANGLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
"""RoPE's cosines and sines (N, d), each twice: buffers, which no optimiser has."""
ROUNDED = 4e-3
"""How far the angles of a file may lie from ours: those in bf16 are rounded by half of that."""
CLASS_TOKEN = (
    "final_layer.linear_cls.weight", "final_layer.linear_cls.bias", "cls_projectors2.weight", "cls_projectors2.bias",
    "wg_norm.weight",
)  # fmt: skip
"""The parameters of REG's token that ours has not, beside its row of the positions."""
FUSED = 2
"""Blocks of a SpeedrunDiT before its fusion, and after it."""
REMARK = (
    "its class token (REG) is left out: its velocity depends on that token, and without it is another one than that of "
    "the project's own code"
)
ORDER = {
    "lightningdit": ("pos_embed", "x_embedder.", "t_embedder.", "y_embedder.", "feat_rope.", "blocks.", "final_layer."),
    "speedrundit": (
        "mask_token", "pos_embed", "fusion_proj.", "x_embedder.", "t_embedder.", "y_embedder.", "blocks.",
        "projectors.", "final_layer.linear.", "final_layer.linear_cls.", "final_layer.", "cls_projectors2.", "wg_norm.",
        "feat_rope.",
    ),
}  # fmt: skip
"""How keys begin, in the order of the published code's state dict, which numbers an optimiser's state too."""


def detected(table: Table, args: Mapping[str, Any]) -> str | None:
    """Which of the two layouts a table has, or neither as far as its keys tell; a LightningDiT without RoPE needs args.

    Its other keys are those of a network of ours with the same options, whose time runs the other way. A SpeedrunDiT's
    shares of values are 0-dim, ours are not.
    """
    if CLASS_TOKEN[-1] in table or any(key.endswith(".attn.v1_lambda") and not t.ndim for key, t in table.items()):
        return "speedrundit"
    known = ANGLES[0] in table or str(args.get("model", "")).startswith("LightningDiT")
    return "lightningdit" if known else None


def config_args(config: Any) -> dict[str, Any]:
    """What the `config` of a LightningDiT's checkpoint tells, as other projects' args have it; {} of anything else."""
    sections = config if isinstance(config, Mapping) else {}
    model, data, transport = (
        section if isinstance(section := sections.get(name), Mapping) else {} for name in ("model", "data", "transport")
    )
    if not str(model.get("model_type", "")).startswith("LightningDiT"):
        return {}
    found = {
        "model": model["model_type"], "num_classes": data.get("num_classes"), "path_type": transport.get("path_type"),
        "prediction": transport.get("prediction"),
    }  # fmt: skip
    return {key: value for key, value in found.items() if isinstance(value, (int, str))}


def plain_config(config: Any) -> bool:
    """Whether a file's `config` is what a YAML file can hold, with no table or list in two places or within itself."""
    left, seen = [config], set[int]()
    while left:
        value = left.pop()
        if isinstance(value, (Mapping, list)):
            if id(value) in seen:
                return False
            seen.add(id(value))
            left += [*value, *value.values()] if isinstance(value, Mapping) else value
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            return False
    return True


def told(table: Table, layout: str, where: str) -> dict[str, Any]:
    """The keys of [model] that the layout tells of a table beyond what shapes do; UserError for what ours can't be."""
    (depth, width), modulation = _size(table), table.get("blocks.0.adaLN_modulation.1.bias")
    found: dict[str, Any] = {"position": "both" if ANGLES[0] in table else "sincos"}
    if layout == "speedrundit":
        return found | {"norm": "rms", "fusion_first": FUSED, "fusion_last": depth - FUSED}
    if modulation is not None and modulation.shape == (4 * width,):
        raise UserError(f"{where}: wo_shift = true (modulations of 4 × {width}): only those with shifts are known here")
    return found


def head_count(table: Table, layout: str) -> int | None:
    """Heads as the angles' width has them, else as LightningDiT's size does; None where neither tells."""
    (depth, width), angles = _size(table), table.get(ANGLES[0])
    if angles is not None and angles.ndim == 2 and angles.shape[1]:
        return max(1, width // angles.shape[1])
    sizes = {(depth, width): heads for depth, width, heads in SIZES.values()} if layout == "lightningdit" else {}
    return sizes.get((depth, width))


def _size(table: Table) -> tuple[int, int]:
    """Depth and width of a table, 0 where it tells none."""
    patches = table.get("x_embedder.proj.weight")
    width = len(patches) if patches is not None and patches.ndim else 0
    return len({key.split(".")[1] for key in table if key.startswith("blocks.")}), width


def split(table: Table, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's table → that of the network, and what is beside it; `joined` puts them together again.

    Also of AdamW's means. Shapes are checked by `check_beside` and by the layout's `check_table`.
    """
    ours, beside = dict(table), {key: table[key] for key in ANGLES if key in table}
    if layout == "speedrundit":
        beside |= {key: table[key] for key in CLASS_TOKEN if key in table}
        if (positions := table.get("pos_embed")) is not None and positions.ndim == 3:
            beside["pos_embed"], ours["pos_embed"] = positions[:, :1], positions[:, 1:]
        ours |= {key: t[None] for key, t in table.items() if key.endswith(".v1_lambda")}
    return {key: t for key, t in ours.items() if key == "pos_embed" or key not in beside}, beside


def joined(ours: Table, beside: Table, layout: str) -> dict[str, Tensor]:
    """The inverse of `split`, in the file's order."""
    found = {**ours, **{key: t for key, t in beside.items() if key != "pos_embed"}}
    if layout == "speedrundit":
        found |= {key: t[0] for key, t in ours.items() if key.endswith(".v1_lambda")}
        if "pos_embed" in beside and "pos_embed" in ours:
            found["pos_embed"] = torch.cat((beside["pos_embed"], ours["pos_embed"]), dim=1)
    return {key: found[key] for key in in_order(found, layout)}


def in_order(keys: Iterable[str], layout: str) -> list[str]:
    """Keys, within each part in the published order already, with the parts in that of the layout's state dict."""
    starts = ORDER[layout]
    return sorted(keys, key=lambda key: next(n for n, start in enumerate(starts) if key.startswith(start)))


def check_beside(beside: Table, config: Model, layout: str, where: str) -> None:
    """UserError unless what a file holds beside the network is all of it, in the shapes that fit, and RoPE's angles."""
    expected = angles(config) if config.rope else {}
    if layout == "speedrundit":
        expected = angles(config)
        outputs, width = beside.get(CLASS_TOKEN[0]), config.width
        rows = len(outputs) if outputs is not None and outputs.ndim else 1
        shapes: tuple[tuple[int, ...], ...] = ((rows, width), (rows,), (width, rows), (width,), (width,))
        expected |= {key: torch.empty(s, device="meta") for key, s in zip(CLASS_TOKEN, shapes, strict=True)}
        expected["pos_embed"] = torch.empty(1, 1, width, device="meta")
    match_strictly(expected, beside, f"{where} as {layout}")
    for key in ANGLES:
        if key not in beside or beside[key].is_meta:
            continue
        if (beside[key] - expected[key]).abs().max() > ROUNDED:
            rows, columns = config.grid
            raise UserError(f"{where}: {key} are not those of a {rows} × {columns} grid at base 10000, which ours has")


def angles(config: Model) -> dict[str, Tensor]:
    """RoPE's buffers (N, d) of a network."""
    pairs = rope_angles(config.head, config.grid)[0].chunk(2, dim=1)
    return {key: of_pairs.repeat_interleave(2, dim=1) for key, of_pairs in zip(ANGLES, pairs, strict=True)}


def own_config(config: Model, path: str) -> dict[str, Any]:
    """The `config` of a LightningDiT's checkpoint, of a model that did not come from one: what tells of its weights.

    A name also of a size that is none of LightningDiT's: a file without RoPE is known by it, and its path read with it.
    """
    sizes = {shape: name for name, shape in SIZES.items()}
    size = sizes.get((config.depth, config.width, config.heads), "custom")
    return {
        "data": {"num_classes": config.num_classes},
        "model": {
            "model_type": f"LightningDiT-{size}/{config.patch}",
            "use_qknorm": bool(config.qk_norm), "use_swiglu": config.mlp == "swiglu",
            "use_rope": config.rope, "use_rmsnorm": config.norm != "layer", "wo_shift": False,
            "in_chans": config.channels,
        },
        "transport": {"path_type": {"linear": "Linear", "cosine": "GVP"}[path], "prediction": "velocity"},
    }  # fmt: skip
