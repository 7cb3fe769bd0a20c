"""The losses between features: REPA's alignment, Self-Transcendence's guided target, and guidance alone."""

SWITCHES = {
    "align": "Negative cosine of two feature maps.",
    "guided_feature_loss": "Guidance of the teacher's features and the loss to them.",
    "cfg_extrapolate": "Guidance of a prediction.",
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
