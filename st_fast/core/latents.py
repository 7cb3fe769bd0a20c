"""How a VAE's latents become those of a diffusion model, in plain numbers: for data, checkpoints and decoders alike."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from st_fast.core.files import shown

LARGEST = 1e4
"""Of any plausible scale, shift, mean or std; those of published VAEs are below 100."""
CLOSE = 1e-5
"""Relative difference that two roundings of the same number may have."""
ONE_ENCODER = {f"{owner}sd-vae-ft-{kind}" for owner in ("", "stabilityai/") for kind in ("mse", "ema")}
"""VAEs with other decoders and the same encoder, so that their latents are the same."""


@dataclass(frozen=True)
class Normalisation:
    """x = scale · (z − shift − latents_mean) / latents_std for a VAE's latents z, with the names that diffusers uses.

    `latents_mean` and `latents_std` are (C,), or empty: zeros and ones. A shift of None is the VAE's own, which sets
    and models of older versions do not tell.
    """

    scale: float = 1.0
    shift: float | None = None
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def problem(self, channels: int) -> str:
        """What is wrong with it for latents of so many channels, or ""."""
        for name, values in self._named():
            if name.startswith("latents") and len(values) not in (0, channels):
                return f"{name} has {len(values)} numbers; the latents have {channels} channels"
            positive = name in ("scale", "latents_std")
            for value in values:
                if not (math.isfinite(value) and abs(value) <= LARGEST and (value > 0 or not positive)):
                    needed = f"a {'positive ' * positive}number, at most {LARGEST:.0e}, is needed"
                    return f"{name} = {shown(value)}: {needed}"
        return ""

    def __str__(self) -> str:
        """One line: numbers by name; of channels only how many, with a hash."""
        told = []
        for name, values in self._named():
            if name.startswith("latents") and values:
                told.append(
                    f"{name} of {len(values)} channels ({hashlib.sha256(repr(values).encode()).hexdigest()[:8]})"
                )
            elif values and (name == "scale" or values[0]):
                told.append(f"{name} {values[0]:.6g}")
        return ", ".join(told)

    def differences(self, other: "Normalisation") -> list[str]:
        """In what this one differs from another, as "name value (other value)"; an unknown shift equals any."""
        found = []
        for (name, ours), (_, theirs) in zip(self._named(), other._named(), strict=True):
            if name == "shift" and not (ours and theirs):
                continue
            usual = 1.0 if name in ("scale", "latents_std") else 0.0
            pairs = list(zip(ours or (usual,) * len(theirs), theirs or (usual,) * len(ours), strict=False))
            wrong = [pair for pair in pairs if not math.isclose(*pair, rel_tol=CLOSE, abs_tol=CLOSE)]
            if len(ours or theirs) != len(theirs or ours):
                found.append(f"{name} of {len(ours)} channels (of {len(theirs)})")
            elif wrong:
                found.append(f"{name} {wrong[0][0]:.5g} ({wrong[0][1]:.5g})")
        return found

    def _named(self) -> Iterator[tuple[str, tuple[float, ...]]]:
        for field in fields(self):
            value = getattr(self, field.name)
            yield field.name, value if isinstance(value, tuple) else () if value is None else (value,)


@dataclass(frozen=True)
class LatentSpace:
    """What latents are of: the VAE's name and the hash of its weights ("": unknown), and their normalisation."""

    vae: str = ""
    vae_hash: str = ""
    normalisation: Normalisation = Normalisation()

    def differences(self, other: "LatentSpace") -> list[str]:
        """In what another model or set has other latents, as "name value (other value)"; what is unknown equals any."""
        found = self.normalisation.differences(other.normalisation)
        one_encoder = {self.vae, other.vae} <= ONE_ENCODER
        if self.vae_hash and other.vae_hash and self.vae_hash != other.vae_hash and not one_encoder:
            named = [f"{one.vae or 'without name'}, {one.vae_hash[:12]}" for one in (self, other)]
            found.insert(0, f"VAE {named[0]} ({named[1]})")
        return found
