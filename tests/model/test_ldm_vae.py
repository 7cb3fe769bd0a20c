"""A VAE in latent diffusion's layout encodes and decodes as that project's code, written down in plain functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.model.ldm_vae import read_ldm_vae
from tests.autoencoders import ldm_decode, ldm_encode, ldm_table

diffusers = pytest.importorskip("diffusers")
Table = dict[str, Tensor]


def prefixed(table: Table, prefix: str) -> Table:
    return {f"{prefix}{name}": tensor for name, tensor in table.items()}


FORMS: dict[str, Callable[[Table, Path], object]] = {
    "alone": torch.save,
    "under model": lambda table, path: torch.save({"model": table, "epoch": 3}, path),
    "first stage": lambda table, path: torch.save(
        {"state_dict": prefixed(table, "first_stage_model.") | {"model.x": torch.zeros(2)}}, path
    ),
    "compiled": lambda table, path: save_file(prefixed(table, "module._orig_mod."), path),
    "in half": lambda table, path: save_file({name: tensor.half() for name, tensor in table.items()}, path),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_file_encodes_and_decodes_as_the_plain_functions(form: str, tmp_path: Path) -> None:
    table = ldm_table(channels=5)
    FORMS[form](table, path := tmp_path / "vae.ckpt")
    if form == "in half":
        table = {name: tensor.half().float() for name, tensor in table.items()}
    vae = read_ldm_vae(path, diffusers.AutoencoderKL).eval()
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 3, 8, 12, generator=generator), torch.randn(2, 5, 4, 6, generator=generator)
    with torch.no_grad():
        found, (mean, std) = vae.encode(x).latent_dist, ldm_encode(table, x)
        torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.std, std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(z).sample, ldm_decode(table, z), rtol=1e-4, atol=1e-5)


def test_levels_layers_and_attention_are_what_the_keys_say(tmp_path: Path) -> None:
    """Two layers in each level here, whose last one has attention in the decoder alone, and no quant_conv."""
    table = ldm_table(channels=5)
    for old, new in (
        ("encoder.down.0.block.0", "encoder.down.0.block.1"),
        ("encoder.mid.block_1", "encoder.down.1.block.1"),
        ("decoder.up.0.block.1", "decoder.up.0.block.2"),
        ("decoder.up.1.block.1", "decoder.up.1.block.2"),
        ("decoder.up.1.attn.1", "decoder.up.1.attn.2"),
    ):
        table |= {name.replace(old, new): tensor for name, tensor in table.items() if name.startswith(old)}
    gone = ("encoder.down.1.attn.", "quant_conv.", "post_quant_conv.")
    table = {name: tensor for name, tensor in table.items() if not name.startswith(gone)}
    table["encoder.conv_in.weight"] = table["encoder.conv_in.weight"][:, :1]
    torch.save(table, tmp_path / "vae.pt")
    config = read_ldm_vae(tmp_path / "vae.pt", diffusers.AutoencoderKL).config
    assert (config.layers_per_block, config.latent_channels, config.block_out_channels) == (2, 5, [32, 64])
    assert config.down_block_types == ["DownEncoderBlock2D"] * 2
    assert config.up_block_types == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
    assert (config.in_channels, config.out_channels, config.scaling_factor) == (1, 3, 1.0)
    assert not config.use_quant_conv and not config.use_post_quant_conv


@pytest.mark.parametrize("kept", ["encoder.", "decoder."])
def test_half_of_a_vae_is_none(kept: str, tmp_path: Path) -> None:
    table = {name: tensor for name, tensor in ldm_table().items() if name.startswith(kept)}
    torch.save(table, tmp_path / "vae.pt")
    with pytest.raises(UserError, match="no VAE of latent diffusion's layout in it"):
        read_ldm_vae(tmp_path / "vae.pt", diffusers.AutoencoderKL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("encoder.down.1.block.0.conv1.weight"), "block.0.conv1.weight is missing, or no convolution"),
        (
            lambda t: t.update({"decoder.conv_in.weight": torch.ones(64)}),
            "decoder.conv_in.weight is missing, or no con",
        ),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("encoder.down.")], r"keys number \[\] of"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("encoder.down.0.")], r"keys number \[1\] of"),
    ],
)
def test_what_the_keys_do_not_tell_is_named(change: Callable[[Table], object], words: str, tmp_path: Path) -> None:
    change(table := ldm_table())
    torch.save(table, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=words):
        read_ldm_vae(tmp_path / "vae.pt", diffusers.AutoencoderKL)


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    save_file(ldm_table(), tmp_path / "vae.safetensors")
    os.truncate(tmp_path / "vae.safetensors", (tmp_path / "vae.safetensors").stat().st_size - 4)
    with pytest.raises(UserError, match=r"vae\.safetensors"):
        read_ldm_vae(tmp_path / "vae.safetensors", diffusers.AutoencoderKL)
