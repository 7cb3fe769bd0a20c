"""Random draws that are the same bits on every device, and the noisy latents that training makes of them."""

SWITCHES = {
    "noisy_latents": "Latents, noise and their mixture at t.",
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
