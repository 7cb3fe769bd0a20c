"""Each kind of autoencoder encodes, decodes and normalises as it is defined: compared with plain loops, on networks
that are stand-ins of one line, which give back what they were given.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.core.latents import Normalisation
from st_fast.model.autoencoders import (
    KINDS,
    Autoencoder,
    DeepCompression,
    Flux2,
    PixelLatents,
    Pixels,
    Representation,
    autoencoder,
)


def stand_in(name: str, encode: Any = None, decode: Any = None, **more: Any) -> Any:
    """An object of a class of that name, with a configuration of `more` but for `attributes` of its own."""
    attributes = more.pop("attributes", {})
    return type(name, (), {"encode": encode, "decode": decode, "config": SimpleNamespace(**more), **attributes})()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_class_is_known_by_its_name_and_any_other_is_taken_for_an_autoencoder_kl() -> None:
    for name, kind in KINDS.items():
        assert type(autoencoder(stand_in(name, block_out_channels=(4,)))) is kind
    assert type(autoencoder(stand_in("AsymmetricAutoencoderKL"))) is Autoencoder


def test_channels_and_factors_follow_from_the_configurations() -> None:
    kl = autoencoder(stand_in("AutoencoderKL", in_channels=1, latent_channels=5, block_out_channels=(4, 8, 8, 16)))
    assert (kl.in_channels, kl.channels, kl.factor, kl.posteriors) == (1, 5, 8, ("sample", "mean"))
    square = {"in_channels": 3, "latent_channels": 5, "block_out_channels": (4, 8, 8)}
    flux = autoencoder(stand_in("AutoencoderKLFlux2", patch_size=(3, 2), **square))
    assert (flux.channels, flux.factor, flux.posteriors) == (30, 12, ("mean", "sample"))
    dc = autoencoder(stand_in("AutoencoderDC", in_channels=3, latent_channels=32, encoder_block_out_channels=(8,) * 6))
    assert (dc.channels, dc.factor, dc.posteriors, dc.normalises) == (32, 32, ("mean",), False)
    rae = autoencoder(stand_in("AutoencoderRAE", num_channels=3, encoder_hidden_size=768, patch_size=14))
    assert (rae.in_channels, rae.channels, rae.factor, rae.posteriors, rae.normalises) == (3, 768, 14, ("mean",), True)
    pixels = autoencoder(Pixels(1))
    assert (pixels.in_channels, pixels.channels, pixels.factor, pixels.posteriors) == (1, 1, 1, ("mean",))
    assert pixels.normalisation == Normalisation(2.0, 0.0)


def test_pixels_have_no_weights_and_take_images_where_they_are_put() -> None:
    pixels = Pixels(3)
    assert pixels.state_dict() == {} and (pixels.device, pixels.dtype) == (torch.device("cpu"), torch.float32)
    assert pixels.to("meta", torch.float16).device == torch.device("meta") and pixels.dtype == torch.float16


def test_the_sizes_that_can_be_encoded_are_the_factors_multiples_or_one() -> None:
    kl = autoencoder(stand_in("AutoencoderKL", block_out_channels=(4, 8, 8)))
    kl.check_size(20)
    with pytest.raises(UserError, match="size = 18: the VAE reduces by 4; a multiple"):
        kl.check_size(18)
    rae = autoencoder(stand_in("AutoencoderRAE", attributes={"decoder_image_size": 28}))
    rae.check_size(28)
    with pytest.raises(UserError, match="size = 56: this autoencoder is for images of 28 × 28"):
        rae.check_size(56)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"scaling_factor": 0.75}, Normalisation(0.75, 0.0)),
        ({"scaling_factor": 2, "shift_factor": -0.5}, Normalisation(2.0, -0.5)),
        ({"scaling_factor": 0.75, "shift_factor": None, "latents_mean": None}, Normalisation(0.75, 0.0)),
        ({"scaling_factor": 1.0, "latents_mean": [0.0, 2.0]}, Normalisation(1.0, 0.0, (0.0, 2.0))),
        ({"scaling_factor": 1.0, "latents_std": [1.0, 2.0]}, Normalisation(1.0, 0.0, (), (1.0, 2.0))),
        (
            {"scaling_factor": 1.0, "latents_mean": [0.0, 0.0], "latents_std": [1.0, 3.0]},
            Normalisation(1.0, 0.0, (0.0, 0.0), (1.0, 3.0)),
        ),
        (
            {"scaling_factor": 1.0, "latents_mean": [3.0, 0.0], "latents_std": [1.0, 1.0]},
            Normalisation(1.0, 0.0, (3.0, 0.0), (1.0, 1.0)),
        ),
        ({"scaling_factor": 0.5, "latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}, Normalisation(0.5, 0.0)),
        (
            {"scaling_factor": 0.5, "latents_mean": 0.25, "latents_std": 3},
            Normalisation(0.5, 0.0, (0.25, 0.25), (3.0, 3.0)),
        ),
        (
            {"scaling_factor": 0.5, "latents_mean": [[[[0.25]], [[4]]]], "latents_std": [[2], [3]]},
            Normalisation(0.5, 0.0, (0.25, 4.0), (2.0, 3.0)),
        ),
    ],
)
def test_a_configurations_numbers_are_the_normalisation(said: dict[str, Any], expected: Normalisation) -> None:
    assert autoencoder(stand_in("AutoencoderKL", latent_channels=2, **said)).normalisation == expected


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"scaling_factor": 2e4}, r"^VAE: scaling_factor = 20000\.0: a positive number, .* in its config$"),
        ({"scaling_factor": 0}, r"^VAE: scaling_factor = 0 in its config; a number above 0 is needed$"),
        ({}, "scaling_factor = None"),
        ({"scaling_factor": 1.0, "shift_factor": float("nan")}, "shift_factor = nan in its config; a number is needed"),
        ({"scaling_factor": 1.0, "latents_std": [2.0]}, "latents_std has 1 numbers; the latents have 2 channels"),
        ({"scaling_factor": 1.0, "latents_mean": [[1.0], [1.0, 2.0]]}, "latents_mean = .*; a list of numbers"),
        ({"scaling_factor": 1.0, "latents_mean": True}, "latents_mean has 1 numbers"),
    ],
)  # fmt: skip
def test_a_configuration_that_can_not_be_is_told(said: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _ = autoencoder(stand_in("AutoencoderKL", latent_channels=2, **said)).normalisation


def flux2(rows: int, columns: int, **more: Any) -> Flux2:
    """With squares of `rows` by `columns`; what it decodes it gives back."""
    found = autoencoder(
        stand_in(
            "AutoencoderKLFlux2", lambda self, x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x, std=x.abs() + 1)),
            lambda self, z: SimpleNamespace(sample=z), patch_size=[rows, columns], latent_channels=2, **more,
        )
    )  # fmt: skip
    assert isinstance(found, Flux2)
    return found


def test_flux2s_squares_go_to_channels_by_channel_row_and_column_and_back() -> None:
    kind, z = flux2(2, 3), drawn(2, 2, 4, 9)
    expected = np.empty((2, 12, 2, 3), np.float32)
    for channel, row, column in np.ndindex(2, 2, 3):
        expected[:, channel * 6 + row * 3 + column] = z.numpy()[:, channel, row::2, column::3]
    mean, std = kind.moments(z)
    assert torch.equal(mean, torch.from_numpy(expected)) and torch.equal(std, mean.abs() + 1)
    assert torch.equal(kind.pixels(mean), z)


def test_flux2_normalises_by_its_batch_norm() -> None:
    mean, var = torch.arange(12.0) - 5.5, torch.arange(12.0) + 0.25
    norm = SimpleNamespace(running_mean=mean, running_var=var)
    how = flux2(2, 3, batch_norm_eps=0.125, attributes={"bn": norm}).normalisation
    assert (how.scale, how.shift, how.latents_mean) == (1.0, 0.0, tuple(mean.tolist()))
    np.testing.assert_allclose(how.latents_std, np.sqrt(np.arange(12) + 0.375), rtol=1e-15)
    for bad in ({"running_var": var - 1}, {"running_mean": mean[:4]}):
        norm = SimpleNamespace(**{"running_mean": mean, "running_var": var, **bad})
        with pytest.raises(UserError, match="statistics of its batch norm: latents_"):
            _ = flux2(2, 3, batch_norm_eps=0.125, attributes={"bn": norm}).normalisation


def test_an_autoencoder_without_a_posterior_has_a_spread_of_zero() -> None:
    dc = autoencoder(stand_in("AutoencoderDC", lambda self, x: SimpleNamespace(latent=x + 3)))
    x = drawn(2, 3, 4, 6)
    assert isinstance(dc, DeepCompression) and torch.equal(dc.moments(x)[0], x + 3)
    pixels = autoencoder(Pixels(3))
    assert isinstance(pixels, PixelLatents) and torch.equal(pixels.moments(x)[0], x)
    assert torch.equal(pixels.pixels(x), x)
    for kind in (dc, pixels):
        assert torch.equal(kind.moments(x)[1], torch.zeros(2, 3, 4, 6))


def test_a_representation_encodes_and_decodes_images_from_0_to_1_and_is_normalised_already() -> None:
    std = torch.tensor([1.0, 0.25])
    rae = autoencoder(
        stand_in(
            "AutoencoderRAE", lambda self, x: SimpleNamespace(latent=3 * x),
            lambda self, z: SimpleNamespace(sample=z / 3), attributes={"_latents_std": std},
        )
    )  # fmt: skip
    x = drawn(2, 3, 4, 6)
    mean, spread = rae.moments(x)
    torch.testing.assert_close(mean, 1.5 * x + 1.5)
    torch.testing.assert_close(rae.pixels(mean), x)
    assert isinstance(rae, Representation) and torch.equal(spread, torch.zeros_like(x))
    assert rae.normalisation == Normalisation(1.0, 0.0)
    std[1] = 0
    with pytest.raises(UserError, match=r"latents_std = 0\.0 among its weights; it must be above 0"):
        _ = rae.normalisation
