"""Networks by their published names: "SiT-XL/2", "MMDiT-24/2". Imports no torch."""

import re
from typing import Any

from st_fast.core.options import did_you_mean
from st_fast.recipe.error import wrong_value

SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
"""SiT's published sizes: (depth, width, heads)."""
PATCHES = (1, 2, 4, 8)
"""The patch sizes that SiT's names take."""
MMDIT = re.compile(r"MMDiT-([1-9][0-9]{0,3})/([1-9][0-9]{0,3})")
"""MMDiT's names: depth and patch, from which the width (32·depth) and the heads (one for each 32 channels) follow."""
MMDIT_HEAD = 32


def named_sizes(name: str) -> dict[str, Any]:
    """What a published name stands for, by key; RecipeError for a name that is none."""
    if found := MMDIT.fullmatch(name):
        depth, patch = int(found[1]), int(found[2])
        return {"network": "mmdit", "depth": depth, "width": MMDIT_HEAD * depth, "heads": depth, "patch": patch}
    named = {f"SiT-{size}/{patch}": (*shape, patch) for size, shape in SIZES.items() for patch in PATCHES}
    if name not in named:
        options = ["custom", *named]
        allowed = ", ".join(options) + ", or MMDiT-depth/patch such as MMDiT-24/2"
        raise wrong_value("model.name", name, allowed + did_you_mean(name, options))
    depth, width, heads, patch = named[name]
    return {"network": "sit", "depth": depth, "width": width, "heads": heads, "patch": patch}
