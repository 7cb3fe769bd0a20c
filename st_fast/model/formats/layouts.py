"""The published layouts: which keys they have, how they are told apart, and the model their shapes describe."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from st_fast import kernels
from st_fast.core.checkpoint import match_strictly
from st_fast.core.errors import UserError
from st_fast.core.files import shown
from st_fast.core.options import ARCHITECTURE_MOST, LAYOUTS
from st_fast.model import network
from st_fast.model.formats import modern, official
from st_fast.model.formats.loaded_state import FUSION, INTERNAL_PREFIX, NULL_CONTEXT, Table, heads, is_head
from st_fast.model.load import EVERY_KEY
from st_fast.recipe import RecipeError
from st_fast.recipe.architecture import LatentSize, Layer, Model, check_shapes, ratio_of
from st_fast.recipe.methods import CONVOLUTION, SelfFlow, SelfRepresentation, SelfTranscendence, VelocityHead, projector
from st_fast.recipe.sizes import MMDIT_HEAD, PATCHES, SIZES

IMAGENET = 1000
"""Classes of the published models, whose tables of labels have one row more."""
MOST_BLOCKS = 1_000
MMDIT_LAYOUTS = ("repa", "self-transcendence")
"""Those whose projects train an MMDiT too."""
TOLD_BY = "convert, sample, evaluate and probe take"
"""The commands with options for what a file does not tell."""
INTERNAL_KEY = f"{INTERNAL_PREFIX}linear.weight"
INTERNAL_ARGS, INTERNAL_BLOCK = ("internal_head", "encoder_depth"), 8
"""What calls the block that it reads, here and there; and that of the released code, whose files do not tell it."""
CLIP_TOKENS = 77
"""Tokens of a caption in the published MMDiTs' data, which no file tells."""


def detect(table: Table, args: Mapping[str, Any], where: str) -> str:
    """The layout of a table of weights; UserError where nothing decides which way its time runs."""
    if str(args.get("model", "")).startswith("DiT"):
        raise UserError(
            f"{where}: a DiT ({shown(args['model'])}): predicts noise on 1000 discrete steps, which is no velocity"
        )
    if (layout := modern.detected(table, args)) is not None:
        return layout
    keys, patches = [key for key in table if is_head(key)], table.get("x_embedder.proj.weight")
    if any(key.startswith("projector.linear") for key in keys) or (patches is not None and patches.ndim == 2):
        return "self-flow"
    if any(key.startswith("ap_head.") for key in keys):
        return "sra"
    if any(re.match(rf"projectors\.\d+\.({CONVOLUTION}|\d+)\.", key) for key in keys):
        return "repa"
    if any(key.startswith(("projectors.", "projectors_final.")) for key in keys):
        return "self-transcendence"
    if is_mmdit(table) or INTERNAL_KEY in table:
        return "repa"
    if args.get("prediction") in ("v", "velocity"):
        return "repa" if args["prediction"] == "v" else "sit"
    if optional := {"blocks.0.mlp.w12.weight", "blocks.0.norm1.weight"} & {*table}:
        raise UserError(
            f"{where}: {min(optional)} is LightningDiT's (t = 1 is data) or of a network of ours (t = 1 is noise): "
            f"layout must be given, as lightningdit or repa ({TOLD_BY} --from)"
        )
    if "blocks.0.attn.q_norm.weight" in table:
        return "repa"
    try:
        rows, (_, channels, patch, _) = len(table["final_layer.linear.bias"]), table["x_embedder.proj.weight"].shape
    except (KeyError, ValueError, TypeError):
        raise UserError(
            f"{where}: unknown layout: no x_embedder.proj and final_layer.linear of a SiT among its {len(table)} keys "
            f"({', '.join(map(shown, list(table)[:6]))}, …); known: {', '.join(LAYOUTS)}"
        ) from None
    if rows == 2 * patch**2 * channels:
        return "sit"
    raise UserError(
        f"{where}: neither heads nor args nor a learnt sigma tell official SiT (t = 1 is data) from REPA (t = 1 is "
        f"noise): layout must be given, as sit or repa ({TOLD_BY} --from)"
    )


def is_mmdit(keys: Iterable[str]) -> bool:
    """Whether the keys of a table are an MMDiT's."""
    return any(key.startswith("joint_blocks.") for key in keys)


def infer(
    table: Table, args: Mapping[str, Any], number_of_heads: int | None, where: str, otherwise: Model | None = None,
    told: Mapping[str, Any] = MappingProxyType({}),
) -> Model:  # fmt: skip
    """The model that the shapes describe; of `otherwise` heads, classes, tokens and grid where nothing tells them.

    `told` has the keys of [model] that the layout itself tells. UserError naming the key that is missing or has an
    impossible shape.
    """
    mmdit = is_mmdit(table)
    blocks, image = ("joint_blocks", "joint_blocks.0.x_block") if mmdit else ("blocks", "blocks.0")
    norm = f"{image}.attn.{'ln_q' if mmdit else 'q_norm'}.weight"
    depth = _depth(table, blocks, where)
    width, channels, patch, _ = _shaped(table, "x_embedder.proj.weight", 4, where)
    position = args.get("position", otherwise.position if otherwise else None)
    rope_alone = position == "rope" and "pos_embed" not in table
    tokens = None if rope_alone else _shaped(table, "pos_embed", 3, where)[1]
    condition = (_text if mmdit else _labels)(table, args, otherwise, where)
    size = _latent_size(tokens, patch, args.get("latent_size"), otherwise, where)
    if norm in table and number_of_heads is None:
        number_of_heads = width // max(_shaped(table, norm, 1, where)[0], 1)
    published = {shape[:2]: (f"SiT-{size}/{patch}", shape[2]) for size, shape in SIZES.items() if patch in PATCHES}
    if mmdit:
        published = {(depth, MMDIT_HEAD * depth): (f"MMDiT-{depth}/{patch}", depth)}
    name, usual_heads = published.get((depth, width), ("custom", 0))
    count = number_of_heads or usual_heads or (otherwise.heads if otherwise else 0)
    if not count:
        raise UserError(
            f"{where}: depth {depth} and width {width} are no published size, so number_of_heads must be given "
            f"({TOLD_BY} --heads)"
        )
    model = Model(
        name=name if count == usual_heads else "custom", depth=depth, width=width, heads=count, patch=patch,
        channels=channels, latent_size=size, internal_head=_internal_head(table, args, depth, where, otherwise),
        **_options(table, image, norm, width, where), **condition,
    )  # fmt: skip
    if otherwise is not None and any(key.startswith(FUSION) for key in table):  # no tensor tells which blocks
        model = replace(model, fusion_first=otherwise.fusion_first, fusion_last=otherwise.fusion_last)
    if rope_alone:
        model = replace(model, position="rope")
    if model.mlp == "swiglu":  # of several ratios with as many channels the one that was meant
        meant = args.get("mlp_ratio"), otherwise and otherwise.mlp_ratio, 4.0
        same = (replace(model, mlp_ratio=ratio) for ratio in meant if isinstance(ratio, (int, float)))
        model = next((other for other in same if other.hidden == model.hidden), model)
    try:
        model = replace(model, **told)
        check_shapes(model)
    except RecipeError as error:
        raise UserError(f"{where}: {error}") from None
    return model


def _options(table: Table, image: str, norm: str, width: int, where: str) -> dict[str, Any]:
    """The keys of [model] that the names of a table's weights tell, those of its first block above all."""
    told: dict[str, Any] = {"qk_norm": norm in table}
    if told["qk_norm"] and f"{norm.removesuffix('weight')}bias" not in table:
        told["qk_norm"] = "rms"
    if f"{image}.mlp.w12.weight" in table:
        hidden = _shaped(table, f"{image}.mlp.w12.weight", 2, where)[0] // 2
        told |= {"mlp": "swiglu", "mlp_ratio": ratio_of(hidden, width, "swiglu")}
    else:
        told["mlp_ratio"] = ratio_of(_shaped(table, f"{image}.mlp.fc1.weight", 2, where)[0], width)
    if f"{image}.norm1.weight" in table:
        told["norm"] = "rms_affine"
    if "register_tokens" in table:
        told["registers"] = _shaped(table, "register_tokens", 3, where)[1]
    told["qkv_bias"] = f"{image}.attn.qkv.bias" in table
    return told | {"value_residual": "blocks.1.attn.v1_lambda" in table}


def _internal_head(table: Table, args: Mapping[str, Any], depth: int, where: str, otherwise: Model | None) -> int:
    """The block that an internal head reads, 0 without one: as `args` tell, else `otherwise`'s, else as published."""
    if INTERNAL_KEY not in table:
        return 0
    told = next((args[name] for name in INTERNAL_ARGS if args.get(name) is not None), None)
    if told is None:
        told = otherwise.internal_head if otherwise and otherwise.internal_head else INTERNAL_BLOCK
    if type(told) is not int or not 1 <= told <= depth:
        raise UserError(
            f"{where}: {INTERNAL_KEY} is there, of block {shown(told)}: one of its blocks 1 to {depth} is needed "
            f"({TOLD_BY} --internal-head)"
        )
    return told


def _latent_size(tokens: int | None, patch: int, told: Any, otherwise: Model | None, where: str) -> LatentSize:
    """The size of a latent with so many tokens: as `told`, else a square, else `otherwise`'s where the tokens fit.

    Without positions nothing but `told` or `otherwise` does.
    """
    pair = tuple(told) if isinstance(told, (list, tuple)) else (told, told)
    sound = len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)
    if tokens is None:
        if sound or otherwise:
            return (pair if pair[0] != pair[1] else pair[0]) if sound or otherwise is None else otherwise.latent_size
        raise UserError(f"{where}: no pos_embed, and nothing tells the size of its latents (latent_size)")
    sound = sound and pair[0] != pair[1]
    if sound and math.prod(side // patch for side in pair) == tokens:
        return pair
    side = math.isqrt(tokens)
    if side**2 == tokens:
        return side * patch
    if otherwise and otherwise.patch == patch and otherwise.tokens == tokens:
        return otherwise.latent_size
    raise UserError(f"{where}: pos_embed has {tokens} tokens, which is no square, and nothing tells their grid")


def _text(table: Table, args: Mapping[str, Any], otherwise: Model | None, where: str) -> dict[str, Any]:
    """What an MMDiT's keys tell of its condition; tokens of a caption from elsewhere where the null is not there."""
    width, said = _shaped(table, "context_embedder.weight", 2, where)[1], args.get("text_length")
    length = said if type(said) is int and 1 <= said <= ARCHITECTURE_MOST["text_length"] else CLIP_TOKENS
    if NULL_CONTEXT in table:
        length = _shaped(table, NULL_CONTEXT, 3, where)[1]
    elif otherwise and otherwise.text_length:
        length = otherwise.text_length
    return {"network": "mmdit", "text_width": width, "text_length": length, "class_dropout": 0.1}


def _labels(table: Table, args: Mapping[str, Any], otherwise: Model | None, where: str) -> dict[str, Any]:
    """What a SiT's table of labels tells of its classes."""
    rows = _shaped(table, "y_embedder.embedding_table.weight", 2, where)[0]
    null = int(_classes(rows, args, otherwise, where) != rows)
    return {"num_classes": rows - null, "class_dropout": 0.1 if null else 0.0}


def _classes(rows: int, args: Mapping[str, Any], otherwise: Model | None, where: str) -> int:
    """The classes of a table of labels with so many rows: as many, or one less where the last is the null class."""
    told, dropped = args.get("num_classes"), args.get("class_dropout_prob")
    if told is None and isinstance(dropped, (int, float)):  # the published table has a null class where labels drop out
        told = max(1, rows - 1) if dropped > 0 else rows
    if told is None and otherwise:
        told = rows if otherwise.num_classes == rows else max(1, rows - 1)
    if told is None and rows == IMAGENET:
        told = rows
    if told is None and rows not in (1, IMAGENET + 1):
        raise UserError(
            f"{where}: y_embedder has {rows} rows: {rows} classes, or {rows - 1} and a null class; num_classes must be "
            f"given ({TOLD_BY} --num-classes {rows} or {rows - 1})"
        )
    if told is not None and told not in (rows, max(1, rows - 1)):
        raise UserError(f"{where}: num_classes = {shown(told)}, but y_embedder has {rows} rows")
    return rows if rows in (1, told) else rows - 1


def _depth(table: Table, blocks: str, where: str) -> int:
    """How many blocks the keys name, which must be numbered through; their number is bounded by the keys'."""
    numbers = {m[1] for key in table if (m := re.match(rf"{blocks}\.([^.]+)\.", key))}
    if (missing := next((n for n in range(len(numbers)) if str(n) not in numbers), None)) is not None:
        raise UserError(f"{where}: unknown layout: no key of {blocks}.{missing}, but {len(numbers)} blocks are named")
    if len(numbers) > MOST_BLOCKS:
        raise UserError(f"{where}: {len(numbers)} blocks, at most {MOST_BLOCKS} are read")
    return len(numbers)


def _shaped(table: Table, key: str, dims: int, where: str) -> tuple[int, ...]:
    if key not in table:
        raise UserError(f"{where}: unknown layout: {key} is missing; a SiT's keys are needed ({', '.join(LAYOUTS)})")
    shape = tuple(table[key].shape)
    if len(shape) != dims or 0 in shape:
        raise UserError(f"{where}: {key} has shape {shape}, {dims} sizes above 0 are needed")
    return shape


def expected_trunk(config: Model, sigma: bool = False, null: bool = True) -> dict[str, Tensor]:
    """Every trunk key with a tensor on the meta device, in the order of the published code's parameters.

    `sigma`: of an official SiT with twice the outputs; without `null`: of an MMDiT as it is published.
    """
    with torch.device("meta"):
        ours = network(config, kernels.select({}, torch.device("cpu"))).state_dict()
        if sigma:
            for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
                ours[key] = torch.empty(2 * len(ours[key]), *ours[key].shape[1:])
    if not null:
        ours.pop(NULL_CONTEXT, None)
    return {key: ours[key] for key in published_order(ours)}


def published_order(keys: Iterable[str]) -> list[str]:
    """Keys of trunk and heads, in our order, in that in which the published code registers its parameters.

    That order numbers an optimiser's state. timm's attention has its projection after the norms; heads come before the
    final layer in a SiT, after it in an MMDiT; an internal head comes before it.
    """
    keys = list(keys)
    of_heads = 4 if is_mmdit(keys) else 2
    place = {key: number for number, key in enumerate(keys)}

    def rank(key: str) -> tuple[int, int, int, int]:
        block = re.match(r"blocks\.(\d+)\.(norm|attn\.proj|attn\.|)", key)
        if block:
            part = ("norm", "attn.", "attn.proj", "").index(block[2])
            return 1, int(block[1]), part, place[key]
        if key.startswith(INTERNAL_PREFIX):
            return 2, 0, 0, place[key]
        last = 3 if key.startswith("final_layer.") else of_heads if is_head(key) else 0
        return last, int(key.startswith("projectors_final")), 0, place[key]

    return sorted(keys, key=rank)


def in_published_order(table: Table, config: Model, layout: str) -> dict[str, Tensor]:
    """A table of trunk and heads, in whatever order, as the published code has it."""
    keys = published_order((*expected_trunk(config), *_expected_heads(heads(table), config, layout)))
    return {key: table[key] for key in keys if key in table}


def optimised(table: Table) -> dict[str, Tensor]:
    """What the published code hands to its optimiser: a SiT's positions are a parameter, an MMDiT's and RoPE's not."""
    buffers = (*modern.ANGLES, *(("pos_embed", NULL_CONTEXT) if is_mmdit(table) else ()))
    return {key: t for key, t in table.items() if key not in buffers}


def check_table(table: Table, config: Model, layout: str, where: str) -> None:
    """UserError listing every missing key, every unexpected one, and every shape or dtype that differs.

    The empty caption's states may be missing.
    """
    if config.network == "mmdit" and layout not in MMDIT_LAYOUTS:
        raise UserError(f"{where}: an MMDiT, which is no network of {layout}: one of {', '.join(MMDIT_LAYOUTS)}")
    if config.internal_head and layout != "repa":
        raise UserError(f"{where}: it has an internal head ({INTERNAL_PREFIX}*), which {layout} has no place for: repa")
    outputs = table["final_layer.linear.bias"].shape if "final_layer.linear.bias" in table else ()
    sigma = layout in official.LAYOUTS and outputs[:1] == (2 * config.patch_values,)
    expected = expected_trunk(config, sigma, null=NULL_CONTEXT in table) | _expected_heads(heads(table), config, layout)
    match_strictly(expected, table, f"{where} as {layout}", limit=EVERY_KEY)


def _rows(tensor: Tensor) -> int:
    """Its first size; 1 of a single number, whose shape is then refused."""
    return tensor.shape[0] if tensor.ndim else 1


def _expected_heads(found: Table, config: Model, layout: str) -> dict[str, Tensor]:
    """The heads that the layout has, sized by the first layer of those found; none where a file has none."""

    def size(key: str, otherwise: int) -> int:
        return _rows(found[key]) if key in found else otherwise

    layers, expected = tuple[Layer, ...](), dict[str, Tensor]()
    if layout == "self-transcendence" and found:
        method = VelocityHead if any(key.startswith("projectors_final.") for key in found) else SelfTranscendence
        layers = method(hidden=size("projectors.0.bias", 2048)).head_layers(config)
        if "projectors_final.adaLN_modulation.1.weight" in found:  # a whole final layer, in the published MMDiT
            layers += (Layer("projectors_final.adaLN_modulation.1", config.width, 2 * config.width),)
    if layout in ("repa", "speedrundit"):
        # iREPA's code names what projects, which may be an MLP, a convolution or one linear layer.
        named = re.compile(rf"projectors\.\d+(\.{CONVOLUTION})?(?=\.)")
        for name in sorted({m[0] for key in found if (m := named.match(key))}):
            if (weight := found.get(f"{name}.weight")) is None:
                layers += projector(name, config, size(f"{name}.0.bias", 2048), size(f"{name}.4.bias", config.width))
                continue
            kernel = weight.shape[2:] if weight.ndim == 4 else ()
            expected[f"{name}.weight"] = torch.empty(_rows(weight), config.width, *kernel, device="meta")
            expected[f"{name}.bias"] = torch.empty(_rows(weight), device="meta")
    if layout in ("sra", "self-flow") and found:
        layers = (SelfRepresentation if layout == "sra" else SelfFlow)().head_layers(config)
    for layer in layers:
        expected[f"{layer.name}.weight"] = torch.empty(layer.outputs, layer.inputs, device="meta")
        expected[f"{layer.name}.bias"] = torch.empty(layer.outputs, device="meta")
    return expected
