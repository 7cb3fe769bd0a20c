"""Published settings of samplers, by name."""

from typing import Any

_SDE: dict[str, Any] = {"sampler": "sde", "steps": 250, "shift": 1.0, "guidance": "cfg", "internal_guidance": 1.0}
"""What they share: a recipe with another guidance has none of it under a preset that names none."""
PRESETS: dict[str, dict[str, Any]] = {
    "repa": _SDE | {"cfg_scale": 1.8, "cfg_range": (0.0, 0.7)},
    "self-transcendence": _SDE | {"cfg_scale": 1.9, "cfg_range": (0.0, 0.65)},
    "internal-guidance": _SDE | {
        "cfg_scale": 1.35, "cfg_range": (0.0, 0.7), "internal_guidance": 1.4, "internal_range": (0.0, 1.0)
    },
    "sprint": _SDE | {"cfg_scale": 3.0, "cfg_range": (0.0, 1.0), "guidance": "path_drop"},
    "unguided": _SDE | {"cfg_scale": 1.0, "cfg_range": (0.0, 1.0)},
}  # fmt: skip
"""REPA's headline numbers (arXiv 2410.06940), Self-Transcendence's (arXiv 2601.07773), Internal Guidance's as its
released script has them (arXiv 2512.24176; its paper guides at t > 0.3 only), SPRINT's as its released configuration
has them (arXiv 2510.21986), and all without guidance."""
