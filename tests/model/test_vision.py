"""Image encoders of every family: which tokens, in which order, after which preprocessing; each against the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from st_fast.core.errors import BadFile, UserError
from st_fast.model.encoders import CLIP, IMAGENET, Statistics, VisionTransformer, load_encoder, resample
from st_fast.recipe import cost
from st_fast.recipe.schema import Model
from tests.train.supervision.encoders import images

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = SIZES | {"intermediate_size": 40}


def dinov2(**options: Any) -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **options))


def with_registers(**options: Any) -> Any:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3, **options)
    return transformers.Dinov2WithRegistersModel(config)


def clip(**options: Any) -> Any:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP, **options))


def mae(**options: Any) -> Any:
    return transformers.ViTMAEModel(transformers.ViTMAEConfig(**MLP, **options))


def ijepa(**options: Any) -> Any:
    return transformers.IJepaModel(transformers.IJepaConfig(**MLP, **options))


FAMILIES: dict[str, tuple[Callable[..., Any], int, int, Statistics]] = {
    "dinov2": (dinov2, 7, 1, IMAGENET),
    "dinov2_with_registers": (with_registers, 7, 4, IMAGENET),
    "clip_vision_model": (clip, 7, 1, CLIP),
    "vit_mae": (mae, 8, 1, IMAGENET),
    "ijepa": (ijepa, 7, 0, IMAGENET),
}
"""What makes a model; its patch, tokens before the patches' and statistics. Images of 16 pixels give 2 × 2 patches."""


def saved(folder: Path, make: Callable[..., Any], patch: int, native: int = 2, seed: int = 0) -> tuple[Any, Path]:
    """An untrained model for native × native patches, every weight random, and the folder it is saved in."""
    torch.manual_seed(seed)
    model = make(image_size=native * patch, patch_size=patch).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


def pixels_of(pictures: Tensor, side: int, statistics: Statistics) -> Tensor:
    """The published order for CLIP, resized first; for the others it is the same up to rounding."""
    unit = pictures.double() / 255
    resized = F.interpolate(unit, (side, side), mode="bicubic") if side != pictures.shape[-1] else unit
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (statistics.mean, statistics.std))
    return ((resized - mean) / std).float()


def expected(kind: str, model: Any, pictures: Tensor) -> Tensor:
    """The patch tokens by the model's own means, (n, N, D)."""
    _, patch, prefix, statistics = FAMILIES[kind]
    pixels = pixels_of(pictures, 2 * patch, statistics)
    if kind != "vit_mae":
        return model(pixel_values=pixels).last_hidden_state[:, prefix:]
    model.config.mask_ratio = 0.0
    seen: list[Tensor] = []
    handle = model.layernorm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    restore = model(pixel_values=pixels).ids_restore  # the patches come out shuffled
    handle.remove()
    assert not torch.equal(restore, torch.arange(4).expand_as(restore))
    return seen[0][:, 1:].gather(1, restore[..., None].expand(-1, -1, seen[0].shape[-1]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_features_are_the_models_patch_tokens_in_their_grid(kind: str, tmp_path: Path) -> None:
    make, patch, prefix, _ = FAMILIES[kind]
    model, folder = saved(tmp_path / kind, make, patch)
    encoder = load_encoder(str(folder), CPU, torch.float32)
    pictures = images(5)
    found = encoder(pictures)
    assert found.shape == (5, 2, 2, 24) and encoder.grid(16) == (2, 2) and encoder.name == kind
    torch.testing.assert_close(found.flatten(1, 2), expected(kind, model, pictures), rtol=1e-4, atol=1e-4)
    assert isinstance(encoder, VisionTransformer) and encoder.tokens.prefix == prefix
    assert not found.requires_grad and not any(p.requires_grad for p in encoder.tokens.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_its_flops_are_pytorchs_own_count_and_it_traces_as_one_graph(kind: str, tmp_path: Path) -> None:
    make, patch, _, _ = FAMILIES[kind]
    encoder = load_encoder(str(saved(tmp_path / kind, make, patch)[1]), CPU, torch.float32)
    assert isinstance(encoder, VisionTransformer)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        plain = encoder(images(1))
    assert encoder.flops(16) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    encoder.run = torch.compile(lambda tokens, pixels: tokens(pixels), fullgraph=True, backend="eager")
    torch.testing.assert_close(encoder(images(1)), plain)


def test_bf16_features_are_near_those_in_float32(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "dinov2", dinov2, 7)[1])
    exact, rough = (load_encoder(folder, CPU, dtype)(images(8)) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert F.cosine_similarity(exact, rough, dim=-1).min() > 0.995


def test_the_vision_tower_of_a_whole_clip_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": 8}, vision_config=MLP | {"image_size": 14, "patch_size": 7}, projection_dim=8
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip", safe_serialization=True)
    found = load_encoder(str(tmp_path / "clip"), CPU, torch.float32)(images(2))
    alone = model.vision_model(pixel_values=pixels_of(images(2), 14, CLIP)).last_hidden_state[:, 1:]
    torch.testing.assert_close(found.flatten(1, 2), alone, rtol=1e-4, atol=1e-4)


def test_positions_for_another_grid_are_resampled_bicubically_with_antialiasing() -> None:
    table = torch.randn(1 + 9 * 9, 3, generator=torch.Generator().manual_seed(0))
    found = resample(table, 4)
    assert torch.equal(found[0], table[0]) and found.shape == (17, 3)
    for channel in range(3):  # Pillow's bicubic filter is antialiased
        square = Image.fromarray(table[1:, channel].view(9, 9).numpy())
        resized = np.asarray(square.resize((4, 4), Image.Resampling.BICUBIC))
        assert np.abs(found[1:, channel].view(4, 4).numpy() - resized).max() < 1e-5
    assert torch.equal(resample(table[1:], 9), table[1:]) and len(resample(table[1:], 4)) == 16


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_trained_at_another_size_gets_those_positions(kind: str, tmp_path: Path) -> None:
    make, patch, _, _ = FAMILIES[kind]
    model, folder = saved(tmp_path / kind, make, patch, native=3)
    encoder = load_encoder(str(folder), CPU, torch.float32)
    small, _ = saved(tmp_path / "small", make, patch)
    names = [name for name in model.state_dict() if "position_embedding" in name]
    state = {name: t for name, t in model.state_dict().items() if name not in names}
    (name,) = names
    table = model.state_dict()[name]
    state[name] = resample(table.view(-1, 24), 2).view(small.state_dict()[name].shape)
    small.load_state_dict(state)
    found = encoder(images(2))
    torch.testing.assert_close(found.flatten(1, 2), expected(kind, small, images(2)), rtol=1e-4, atol=1e-4)


def test_a_file_that_lacks_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "clip", clip, 7)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("fc1.weight"))
    save_file({key: t for key, t in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of a CLIPVisionModel are missing: .*fc1.weight"):
        load_encoder(str(folder), CPU, torch.float32)


def test_what_would_take_more_than_its_file_is_refused_before_the_library_reads_it(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "clip", clip, 7)
    config, weights = folder / "config.json", folder / "model.safetensors"
    sound = config.read_text()
    config.write_text(sound.rstrip().removesuffix("}") + f', "deep": {"[" * 300}{"]" * 300}}}')
    with pytest.raises(BadFile, match=r"config\.json: not valid JSON .nested"):
        load_encoder(str(folder), CPU, torch.float32)
    config.write_text(sound)
    weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])
    with pytest.raises(BadFile, match=r"model\.safetensors: the header claims 1099511627776 bytes"):
        load_encoder(str(folder), CPU, torch.float32)


def test_an_encoder_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Unreachable:
        @staticmethod
        def from_pretrained(name: str) -> None:
            logging.getLogger("huggingface_hub").warning("Retrying in 8s [Retry 5/5].")
            raise OSError("We couldn't connect.\nmore")

    monkeypatch.setattr("transformers.AutoConfig", Unreachable)
    monkeypatch.setattr("st_fast.model.vae.answers", lambda address: None)
    with pytest.raises(UserError, match=r"facebook/none.*couldn't connect") as caught:
        load_encoder("facebook/none", CPU, torch.float32)
    assert "\n" not in str(caught.value) and not caplog.records


@pytest.mark.parametrize(("name", "millions"), [("small", 22), ("base", 87), ("large", 304), ("giant", 1136)])
def test_a_dry_run_knows_the_published_encoders_by_name(name: str, millions: int) -> None:
    model = Model("SiT-B/2", depth=12, width=768, heads=12, patch=2, latent_size=32)
    found = cost.live_encoder_flops(f"facebook/dinov2-{name}", model)
    least = 2 * 256 * millions * 1e6  # every weight is used for every patch
    assert least < found < 1.35 * least
    assert cost.live_encoder_flops(f"facebook/dinov2-with-registers-{name}", model) > found
    assert cost.live_encoder_flops("some/folder", model) == 0
