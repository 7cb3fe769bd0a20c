"""Self-Flow's released layout against a network written out from its convention, with one time and with many."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from st_fast import kernels
from st_fast.convert.exporting import export_file
from st_fast.core.errors import UserError
from st_fast.model import SiT
from st_fast.model.formats import LoadedState, import_file
from st_fast.model.layout import Layout
from st_fast.recipe.methods import SelfFlow

DEPTH, WIDTH, HEADS, SIDE, CLASSES, CHANNELS, PATCH = 2, 24, 2, 3, 7, 4, 2
TOKENS = SIDE**2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        m = self.adaLN_modulation(c).chunk(6, dim=-1)  # (B, N, D) each
        qkv = self.attn["qkv"](F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + m[1]) + m[0])
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        x = x + m[2] * self.attn["proj"](a.transpose(1, 2).flatten(2))
        y = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + m[4]) + m[3]
        return x + m[5] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](y), approximate="tanh"))


class Released(nn.Module):
    """Tokens (B, N, C·p·p), noise levels (B, N) and labels → (B, N, C·p·p): inside, SiT's time and sign."""

    def __init__(self, sigma: bool = True, head: bool = True) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, WIDTH), requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(CHANNELS * PATCH**2, WIDTH)})
        embedder = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": embedder})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, WIDTH)})
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.outputs = CHANNELS * (2 if sigma else 1)
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        linear = nn.Linear(WIDTH, self.outputs * PATCH**2)
        self.final_layer = nn.ModuleDict({"linear": linear, "adaLN_modulation": modulation})
        if head:
            layers = {"linear1": nn.Linear(WIDTH, 2 * WIDTH), "linear2": nn.Linear(2 * WIDTH, WIDTH)}
            self.projector = nn.ModuleDict(layers)

    def forward(self, tokens: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        angle = (1 - levels)[..., None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        t = self.t_embedder["mlp"](torch.cat((angle.cos(), angle.sin()), -1))
        c = t + self.y_embedder["embedding_table"](labels)[:, None]
        x = self.x_embedder["proj"](tokens) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=-1)
        out = self.final_layer["linear"](F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
        pixels = out.unflatten(-1, (PATCH, PATCH, self.outputs))  # p, q, c
        return -pixels.permute(0, 1, 4, 2, 3)[:, :, :CHANNELS].flatten(2)  # c, p, q


def released(**settings: bool) -> Released:
    torch.manual_seed(2)
    model = Released(**settings)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape)
    return model


def patches(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) → tokens (B, N, C·p·p), row by row."""
    cut = [x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1) for r in range(SIDE) for c in range(SIDE)]
    return torch.stack(cut, dim=1)


def ours(loaded: LoadedState) -> SiT:
    model = SiT(loaded.config, kernels.select({}, torch.device("cpu"))).eval()
    model.load_state_dict({key: t for key, t in loaded.model.items() if not key.startswith("projector")})
    return model


def read(path: Path) -> LoadedState:
    return import_file(path, number_of_heads=HEADS, num_classes=CLASSES)


@pytest.mark.parametrize("form", ["model", "state_dict", "bare", "module."])
@pytest.mark.parametrize("settings", [{}, {"sigma": False}, {"head": False}])
@torch.no_grad()
def test_its_file_gives_the_same_velocity_at_one_time_and_at_two_in_an_image(form, settings, tmp_path):
    model = released(**settings)
    state = {("module." if form == "module." else "") + key: t for key, t in model.state_dict().items()}
    torch.save({form: state} if form in ("model", "state_dict") else state, tmp_path / "in.pt")
    loaded = read(tmp_path / "in.pt")
    assert (loaded.layout, loaded.path) == ("self-flow", "linear")
    assert (loaded.config.patch, loaded.config.channels, loaded.config.num_classes) == (PATCH, CHANNELS, CLASSES)
    x, labels, t = torch.randn(4, CHANNELS, 6, 6), torch.tensor([0, 3, 6, 7]), torch.tensor([0.0, 0.3, 0.8, 1.0])
    theirs = model(patches(x), t[:, None].expand(-1, TOKENS), labels)
    torch.testing.assert_close(patches(ours(loaded)(x, t, labels)[0]), theirs, rtol=1e-3, atol=2e-5)
    order, times = torch.rand(4, TOKENS).argsort(dim=1), torch.rand(4, 2)
    each = torch.empty(4, TOKENS).scatter_(1, order, times.repeat_interleave(torch.tensor([2, 7]), dim=1))
    found = ours(loaded)(x, times, labels, 0, Layout(order, (2, 7)))[0]
    torch.testing.assert_close(patches(found), model(patches(x), each, labels), rtol=1e-3, atol=2e-5)


def test_what_was_read_is_written_bit_by_bit_and_loads_there_strictly(tmp_path):
    model = released()
    torch.save({"model": {f"module.{key}": t for key, t in model.state_dict().items()}}, tmp_path / "in.pt")
    export_file(read(tmp_path / "in.pt"), "self-flow", tmp_path / "out.pt", "ema")
    again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(again) == ["model"]
    plain = {key.removeprefix("module."): t for key, t in again["model"].items()}
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(t, plain[key]) for key, t in model.state_dict().items())
    released().load_state_dict(plain)


@torch.no_grad()
def test_a_model_of_ours_runs_in_its_code_with_the_averaged_weights(tmp_path):
    torch.save(released().state_dict(), tmp_path / "in.pt")
    loaded = read(tmp_path / "in.pt")
    average = {key: t + 0.01 for key, t in loaded.model.items() if not key.startswith("projector")}
    own = LoadedState(config=loaded.config, layout="self-flow", model=loaded.model, ema=average)
    export_file(own, "self-flow", tmp_path / "out.pt", "ema")
    theirs = released()
    theirs.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True)["model"])
    model = ours(loaded)
    model.load_state_dict(average)
    x, labels, t = torch.randn(3, CHANNELS, 6, 6), torch.tensor([1, 2, 7]), torch.tensor([0.1, 0.5, 0.9])
    found = theirs(patches(x), t[:, None].expand(-1, TOKENS), labels)
    torch.testing.assert_close(patches(model(x, t, labels)[0]), found, rtol=1e-3, atol=2e-5)


def test_heads_of_our_stage_are_those_of_its_file(tmp_path):
    torch.save(released().state_dict(), tmp_path / "in.pt")
    loaded = read(tmp_path / "in.pt")
    declared = {
        f"{layer.name}.weight": (layer.outputs, layer.inputs) for layer in SelfFlow().head_layers(loaded.config)
    }
    found = {key: tuple(t.shape) for key, t in loaded.model.items() if key.startswith("projector") and t.ndim == 2}
    assert found == declared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias"),
        (lambda s: s.pop("projector.linear2.weight"), "projector.linear2.weight"),
        (lambda s: s.update(extra=torch.zeros(3)), "extra"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(WIDTH, 15)}), "patches of 15 numbers"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(WIDTH, 4, 2, 2)}), "a linear layer's"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(WIDTH, 0)}), "patches of 0 numbers"),
        (lambda s: s.update({"final_layer.linear.bias": torch.zeros(17)}), "final_layer.linear.bias"),
        (lambda s: s.update({"final_layer.linear.bias": torch.zeros(())}), "final_layer.linear.bias"),
    ],
)
def test_a_file_that_is_not_quite_it_is_refused_in_one_line(change, said, tmp_path):
    state = dict(released().state_dict())
    change(state)
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(UserError) as refused:
        read(tmp_path / "in.safetensors")
    assert said in str(refused.value) and str(tmp_path / "in.safetensors") in str(refused.value)


def test_norms_of_queries_and_keys_have_no_place_in_its_code(tmp_path):
    torch.save(released().state_dict(), tmp_path / "in.pt")
    loaded = read(tmp_path / "in.pt")
    with pytest.raises(UserError, match=r"model\.qk_norm = true: self-flow's own code has false only"):
        export_file(replace(loaded, config=replace(loaded.config, qk_norm=True)), "self-flow", tmp_path / "o.pt", "ema")
