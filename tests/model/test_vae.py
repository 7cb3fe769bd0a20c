"""Moments and images go through any AutoencoderKL as diffusers defines it, and a missing one is told in one line."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from st_fast.core.errors import UserError, how_to_install
from st_fast.core.latents import Normalisation
from st_fast.model.autoencoders import autoencoder
from st_fast.model.vae import (
    ATTEMPTS,
    PATIENCE,
    decode,
    encode_moments,
    latent_shape,
    load_vae,
    tensors_hash,
    vae_hash,
)
from st_fast.prepare.small_vae import SmallVae, latent_scale, new_vae, train_vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    vae = new_vae(SmallVae((4, 4, 8), 0, latent_channels=3), 1, 16)
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    return tmp_path


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_moments_are_mean_and_std_of_the_posterior(folder: Path) -> None:
    vae = load_vae(folder)
    moments = encode_moments(vae, images())
    raw_mean, log_variance = vae.quant_conv(vae.encoder(images() / 127.5 - 1)).chunk(2, dim=1)
    assert moments.shape == (3, 6, 4, 4) == (3, 2 * latent_shape(vae, 16)[0], *latent_shape(vae, 16)[1:])
    assert torch.allclose(moments, torch.cat((raw_mean, (0.5 * log_variance).exp()), 1), atol=1e-5)


def test_images_are_left_as_they_were(folder: Path) -> None:
    before = images()
    given = before.clone()
    encode_moments(load_vae(folder), given)
    assert torch.equal(given, before)


def test_decode_takes_scaled_latents_and_gives_bytes(folder: Path) -> None:
    vae = load_vae(folder)
    z = torch.randn(2, 3, 4, 4)
    pixels = decode(vae, z * 0.5, Normalisation(0.5))
    expected = ((vae.decoder(vae.post_quant_conv(z)) + 1) * 127.5).round().clamp(0, 255)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels.float(), expected)


def test_pixels_from_0_to_1_are_decoded_to_all_bytes(folder: Path) -> None:
    vae = load_vae(folder)
    z = torch.randn(2, 3, 4, 4)
    expected = (vae.decoder(vae.post_quant_conv(z)) * 255).round().clamp(0, 255)
    assert torch.equal(decode(vae, z * 0.5, Normalisation(0.5), black=0.0).float(), expected)


def test_a_shift_factor_is_taken_off_and_put_back(folder: Path) -> None:
    vae = load_vae(folder)
    plain, picture = encode_moments(vae, images()), decode(vae, torch.ones(1, 3, 4, 4), Normalisation(0.5))
    vae.register_to_config(shift_factor=0.25)
    assert torch.allclose(encode_moments(vae, images()), plain - torch.tensor([0.25] * 3 + [0] * 3).view(1, 6, 1, 1))
    assert torch.equal(decode(vae, torch.ones(1, 3, 4, 4) - 0.125, Normalisation(0.5)), picture)


def test_the_hash_is_that_of_the_files_weights_in_whatever_precision_they_compute(folder: Path) -> None:
    half = load_vae(folder, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    assert vae_hash(half) == vae_hash(load_vae(folder)) != tensors_hash(half.state_dict())


def test_the_hash_follows_the_weights_not_the_file(folder: Path, tmp_path: Path) -> None:
    vae = load_vae(folder)
    before = vae_hash(vae)
    vae.save_pretrained(tmp_path / "again")
    assert vae_hash(load_vae(tmp_path / "again")) == before
    next(vae.parameters()).data.view(-1)[0] += 1
    assert vae_hash(vae) != before


def test_missing_diffusers_is_one_line_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=re.escape(how_to_install("vae"))) as caught:
        load_vae("sd-vae-ft-mse")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_vae_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"neither a folder with an autoencoder \(AutoencoderKL, .*in safetensors"
    ) as caught:
        load_vae(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sd-vae-ft-mse", "sd-vae-ft-ema"])
def test_a_preset_without_a_network_is_one_line_that_says_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    class Unreachable:
        @staticmethod
        def load_config(source: str, **options: object) -> None:
            logging.getLogger("huggingface_hub").warning("Retrying in 8s [Retry 5/5].")
            warnings.warn("an argument of diffusers is deprecated", UserWarning, stacklevel=1)
            raise OSError(f"{source} does not appear to have a file named config.json.\nmore")

    monkeypatch.setattr("st_fast.model.vae.autoencoder_class", lambda *name: Unreachable)
    monkeypatch.setattr("st_fast.model.vae.answers", lambda address: None)
    words = f"'{name}': stabilityai/{name} can't be had from the hub; .* a folder .* small or pixels"
    with pytest.raises(UserError, match=words) as caught:
        load_vae(name)
    assert "\n" not in str(caught.value) and not caplog.records and not recwarn.list
    assert logging.getLogger("huggingface_hub").level != logging.ERROR, "quiet only meanwhile"


def test_a_hub_that_does_not_answer_is_told_within_seconds_and_only_for_what_is_not_at_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def unanswered(address: str) -> None:
        asked.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr("st_fast.model.vae.answers", unanswered)
    monkeypatch.setattr("st_fast.model.vae.time.sleep", lambda seconds: None)
    monkeypatch.setattr("diffusers.AutoencoderKL.load_config", pytest.fail)  # minutes of its own attempts
    with pytest.raises(UserError, match=r"vae = 'foo/bar': .*no answer from https?://\S+: no route to host\)$"):
        load_vae("foo/bar")
    assert capsys.readouterr().err == "asking the hub for foo/bar\n" and len(asked) == ATTEMPTS
    assert ATTEMPTS * (PATIENCE + 1) <= 15
    monkeypatch.undo()
    monkeypatch.setattr("st_fast.model.vae.answers", unanswered)
    load_vae(folder)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"cache/{file}")
    monkeypatch.setattr("diffusers.AutoencoderKL.load_config", lambda source, **options: {})
    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", lambda source, **options: torch.nn.Identity())
    load_vae("foo/bar")
    assert capsys.readouterr().err == "" and len(asked) == ATTEMPTS


def test_a_pickled_vae_is_never_opened(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"neither a folder with an autoencoder .*in safetensors"):
        load_vae(folder)


def test_training_is_repeatable_lowers_the_error_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = SmallVae((4, 4), 30, batch_size=4)
    smooth = torch.nn.functional.interpolate(images(8).float(), (8, 8), mode="area").to(torch.uint8)
    one, two = train_vae(smooth, config), train_vae(smooth, config)
    assert torch.equal(torch.rand(3), expected)
    assert vae_hash(one) == vae_hash(two)

    def error(vae: object) -> float:
        mean = encode_moments(vae, smooth).chunk(2, dim=1)[0]
        return float((decode(vae, mean, Normalisation(1.0)).float() - smooth.float()).square().mean())

    assert error(one) < 0.5 * error(new_vae(config, 1, 8))


def test_images_may_be_given_from_0_to_1() -> None:
    pixels, black = load_vae("pixels-gray"), 0.0
    assert torch.allclose(encode_moments(pixels, images(), "mean", black=black), images() / 255, atol=1e-7)
    found = decode(pixels, 2 * encode_moments(pixels, images(), "mean", black=black), Normalisation(2.0, 0.0), black)
    assert torch.equal(found, images())


def test_latent_scale_brings_samples_to_unit_variance() -> None:
    mean, std = torch.randn(64, 4, 8, 8) * 3 + 1, torch.rand(64, 4, 8, 8)
    scale = latent_scale(torch.cat((mean, std), dim=1))
    assert abs(float((scale * (mean + std * torch.randn_like(std))).std()) - 1) < 0.01


@pytest.mark.parametrize("nested", [False, True])
def test_mean_and_std_of_the_configuration_are_taken_off_and_put_back(folder: Path, nested: bool) -> None:
    vae = load_vae(folder)
    plain, picture = encode_moments(vae, images()), decode(vae, torch.ones(1, 3, 4, 4), Normalisation(0.5))
    mean, std = torch.tensor([0.1, -2.0, 0.0]), torch.tensor([0.5, 3.0, 1.5])
    said = [part.view(1, 3, 1, 1).tolist() if nested else part.tolist() for part in (mean, std)]
    vae.register_to_config(latents_mean=said[0], latents_std=said[1], shift_factor=0.25)
    found = encode_moments(vae, images())
    assert torch.allclose(found[:, :3], (plain[:, :3] - 0.25 - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-6)
    assert torch.allclose(found[:, 3:], plain[:, 3:] / std.view(3, 1, 1), atol=1e-6)
    how = autoencoder(vae).normalisation
    assert (how.scale, how.shift) == (0.5, 0.25) and how.latents_mean == pytest.approx(mean.tolist())
    z = torch.ones(1, 3, 4, 4) / 0.5  # as decoded above
    again = decode(vae, 0.5 * (z - 0.25 - mean.view(3, 1, 1)) / std.view(3, 1, 1), how)
    assert (again.float() - picture.float()).abs().max() <= 1


def test_a_normalisation_that_changes_nothing_is_none(folder: Path) -> None:
    vae = load_vae(folder)
    vae.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    assert autoencoder(vae).normalisation == Normalisation(0.5, 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents_mean": [0.1, 0.0]}, "latents_mean has 2 numbers; the latents have 3 channels"),
        ({"latents_std": [0.0, 1.0, 1.0]}, r"latents_std = 0.0: a positive number"),
        ({"latents_std": [float("nan"), 1.0, 1.0]}, r"latents_std = nan"),
        ({"latents_mean": ["a", 1.0, 1.0]}, r"latents_mean = .* a list of numbers"),
        ({"shift_factor": "a"}, r"shift_factor = 'a'"),
    ],
)
def test_a_normalisation_that_can_not_be_is_refused(folder: Path, changes: dict[str, object], words: str) -> None:
    vae = load_vae(folder)
    vae.register_to_config(**changes)
    with pytest.raises(UserError, match=words):
        encode_moments(vae, images())


@pytest.mark.parametrize("value", [None, "1", 0, -1.0, float("inf"), True])
def test_a_scale_that_is_no_number_above_0_is_told(folder: Path, value: object) -> None:
    vae = load_vae(folder)
    vae.register_to_config(scaling_factor=value)
    with pytest.raises(UserError, match="scaling_factor"):
        encode_moments(vae, images())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000, for"),
        ({"block_out_channels": [2**20, 2**20, 2**20]}, "describes [0-9]{12,} weights"),
        ({"block_out_channels": [4] * 10_000}, "block_out_channels = .*, for"),
        ({"block_out_channels": "wide"}, "describes no AutoencoderKL"),
        ({"norm_num_groups": 0}, "describes no AutoencoderKL"),
    ],
)
def test_a_config_larger_than_its_weights_is_refused_before_it_is_built(
    folder: Path, changes: dict[str, object], words: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=words) as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value)
