"""fp8 for the blocks' linear layers through torchao: tensorwise scales, made anew from every tensor (arXiv 2209.05433).

Forward products take e4m3, gradients e5m2. Weights stay the same parameters under the same names, in bf16 with float32
masters, and are cast for each product; so checkpoints do not change. Left out, because they are small and what they
make is sensitive or read by everything after them: the embedders, the adaLN projections and the final layer. The heads
and a frozen teacher stay in bf16 too.
"""

import importlib
import re
from typing import Any

import torch
from torch import nn

from st_fast.core.errors import UserError, how_to_install
from st_fast.model.transformer import DiffusionTransformer
from st_fast.recipe import Recipe

LEAST_CAPABILITY = (8, 9)
"""Ada and Hopper: the first GPUs with fp8 products."""
SWAPPED = re.compile(r"(joint_)?blocks\.\d+\.((x|context)_block\.)?(attn\.(qkv|proj)|mlp\.\w+)")


def check_fp8(recipe: Recipe, device: torch.device) -> None:
    """UserError, in one line, if the recipe wants fp8 and the device or the library for it is missing."""
    problem = None if recipe.run.fp8 == "off" else _missing(device)
    if problem is not None:
        raise UserError(f"run.fp8 = {recipe.run.fp8!r}: {problem}; --run.fp8=off trains without it")


def _missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a GPU of compute capability 8.9 or above, the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability 8.9 or above, {name} has {capability[0]}.{capability[1]}"
    try:
        getattr(importlib.import_module("torchao.float8"), "convert_to_float8_training")  # noqa: B009
    except ModuleNotFoundError:
        return f"torchao is not installed: {how_to_install('fp8')}"
    except Exception as error:  # built for another torch it fails in many ways
        return f"torchao.float8 can't be used with torch {torch.__version__} ({type(error).__name__})"
    return None


def use_fp8(model: DiffusionTransformer, emulate: bool = False) -> None:
    """Swaps the linear layers of a model that is trained; before it is compiled.

    `emulate` rounds to fp8 and multiplies in the weights' dtype: for machines without fp8, to see what it does.
    """
    library: Any = importlib.import_module("torchao.float8")
    library.convert_to_float8_training(
        model,
        module_filter_fn=lambda module, name: isinstance(module, nn.Linear) and bool(SWAPPED.fullmatch(name)),
        config=library.Float8LinearConfig(emulate=emulate),
    )
