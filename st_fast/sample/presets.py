"""Published ways to sample, by name, as settings over a recipe's own."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "repa": {"sampler": "sde", "steps": 250, "cfg_scale": 1.8, "cfg_range": (0.0, 0.7)},
    "self-transcendence": {"sampler": "sde", "steps": 250, "cfg_scale": 1.9, "cfg_range": (0.0, 0.65)},
    "unguided": {"sampler": "sde", "steps": 250, "cfg_scale": 1.0, "cfg_range": (0.0, 1.0)},
}
"""REPA's headline numbers (arXiv 2410.06940), Self-Transcendence's (arXiv 2601.07773), and both without guidance."""
