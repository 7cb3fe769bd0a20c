"""Latents that are no squares, and latents of another shape than the network's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from st_fast import kernels
from st_fast.core.checkpoint.meta import Meta, read_meta
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.model import DiffusionTransformer, network
from st_fast.model.formats.layouts import infer
from st_fast.model.layers import sincos_positions, unpatchify
from st_fast.model.load import Published, read_config, write_pretrained
from st_fast.recipe import RecipeError
from st_fast.recipe.architecture import Model, check_shapes, resolve_model

OPS = ("norm_modulate", "gate_residual_norm_modulate", "qk_norm", "linear", "gelu_tanh")
TABLE = kernels.select(dict.fromkeys(OPS, "reference"), torch.device("cpu"))
WIDE = Model(
    "custom", depth=2, width=24, heads=3, patch=2, channels=3, latent_size=(6, 10), num_classes=7, class_dropout=0.2
)


def filled(config: Model, seed: int = 0) -> DiffusionTransformer:
    """A float64 model of which every part matters."""
    torch.manual_seed(seed)
    model = network(config, TABLE).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def by_formula(width: int, rows: int, columns: int, unit: float = 1.0) -> np.ndarray:
    """(rows·columns, width) in float64, number by number: sines and cosines of the column, then of the row."""
    quarter = width // 4
    table = np.empty((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                frequency = 10_000.0 ** (-k / quarter)
                for place, coordinate in enumerate((column, row)):
                    angle, start = unit * coordinate * frequency, 2 * quarter * place
                    table[row * columns + column, start + k] = np.sin(angle)
                    table[row * columns + column, start + quarter + k] = np.cos(angle)
    return table


def plainly(model: DiffusionTransformer, x: Tensor, t: Tensor, labels: Tensor, positions: np.ndarray) -> Tensor:
    """The velocity, written down from the paper: patches are cut and put back one by one."""
    w, config = model.state_dict(), model.config
    p, (rows, columns) = config.patch, (x.shape[2] // config.patch, x.shape[3] // config.patch)

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    def places(row: int, column: int) -> tuple[slice, slice]:
        return slice(row * p, row * p + p), slice(column * p, column * p + p)

    cells = [places(row, column) for row in range(rows) for column in range(columns)]
    tokens = torch.stack([x[:, :, down, across].flatten(1) for down, across in cells], dim=1)
    h = linear("x_embedder.proj", tokens) + torch.from_numpy(positions)
    angles = t[:, None] * torch.exp(-np.log(10_000.0) * torch.arange(128) / 128)
    c = torch.cat((angles.cos(), angles.sin()), -1).double()
    c = (
        linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", c)))
        + w["y_embedder.embedding_table.weight"][labels]
    )
    c = F.silu(c)
    for number in range(config.depth):
        name = f"blocks.{number}"
        m = linear(f"{name}.adaLN_modulation.1", c).chunk(6, dim=1)
        q, k, v = (part.unflatten(-1, (config.heads, -1)).transpose(1, 2)
                   for part in linear(f"{name}.attn.qkv", modulated(h, *m[:2])).chunk(3, dim=-1))  # fmt: skip
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        h = h + m[2][:, None] * linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{name}.mlp.fc1", modulated(h, m[3], m[4])), approximate="tanh")
        h = h + m[5][:, None] * linear(f"{name}.mlp.fc2", inner)
    out = linear("final_layer.linear", modulated(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)))
    velocity = torch.empty_like(x)
    for number, (down, across) in enumerate(cells):
        velocity[:, :, down, across] = out[:, number].reshape(-1, p, p, config.channels).permute(0, 3, 1, 2)
    return velocity


@pytest.mark.parametrize(("rows", "columns", "unit"), [(3, 5, 1.0), (7, 2, 0.625), (1, 4, 2.5)])
def test_positions_of_any_grid_are_the_formulas(rows, columns, unit):
    ours = sincos_positions(12, (rows, columns), unit)[0]
    np.testing.assert_allclose(ours.numpy(), by_formula(12, rows, columns, unit), rtol=0, atol=1e-6)


def test_unpatchify_undoes_the_cutting_of_a_latent_of_any_shape():
    x = torch.arange(2 * 3 * 6 * 10.0).view(2, 3, 6, 10)
    cut = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 15, 12)
    assert torch.equal(unpatchify(cut, 2, 3, (3, 5)), x)
    assert unpatchify(cut[:0], 2, 3, (3, 5)).shape == (0, 3, 6, 10)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 14), (8, 8)])
def test_the_networks_velocity_is_the_plain_ones_at_its_own_shape_and_at_others(shape):
    model = filled(replace(WIDE, qk_norm=False))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, *shape, generator=generator, dtype=torch.float64)
    t, labels = torch.tensor([0.1, 0.45, 0.93], dtype=torch.float64), torch.tensor([0, 7, 4])
    rows, columns = shape[0] // 2, shape[1] // 2
    unit = (15 / (rows * columns)) ** 0.5
    expected = plainly(model, x, t, labels, by_formula(24, rows, columns, unit))
    with torch.no_grad():
        velocity, _ = model(x, t, labels)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_twice_the_side_has_coordinates_in_half_steps_and_the_weights_stay_what_they_were():
    model = filled(WIDE)
    keys = set(model.state_dict())
    larger = model.positions((6, 10))
    assert larger.dtype == torch.float64 and larger is model.positions((6, 10))
    np.testing.assert_allclose(larger[0].numpy(), by_formula(24, 6, 10, 0.5), rtol=0, atol=1e-6)
    assert model.positions((3, 5)) is model.pos_embed and set(model.state_dict()) == keys


def test_a_pair_of_equal_sides_is_one_number_and_a_config_of_squares_stays_as_it_was():
    assert resolve_model(replace(WIDE, latent_size=(6, 6))) == replace(WIDE, latent_size=6)
    square = replace(WIDE, latent_size=6)
    assert square.described()["latent_size"] == square.architecture()["latent_size"] == 6
    assert (square.grid, square.tokens, square.latent_shape) == ((3, 3), 9, (3, 6, 6))
    assert (WIDE.grid, WIDE.tokens, WIDE.latent_shape) == ((3, 5), 15, (3, 6, 10))


def test_a_side_that_the_patch_does_not_divide_is_named():
    with pytest.raises(RecipeError, match=r"model.latent_size = \[6, 9\]: not divisible by patch .*a multiple of 2"):
        check_shapes(replace(WIDE, latent_size=(6, 9)))


def test_a_published_folder_and_a_checkpoints_manifest_keep_height_and_width(tmp_path):
    model = filled(WIDE).float()
    write_pretrained(tmp_path, model.state_dict(), Published(WIDE))
    assert read_config(tmp_path).model == WIDE
    assert torch.equal(type(model).from_pretrained(tmp_path).pos_embed, model.pos_embed)
    said = read_meta({"architecture": WIDE.architecture()}, 0, "here")
    assert isinstance(said, Meta) and said.architecture is not None and WIDE.differences(said.architecture) == []
    turned = replace(WIDE, latent_size=(10, 6))
    assert turned.differences(said.architecture) == ["latent_size [6, 10] (this recipe: [10, 6])"]


@pytest.mark.parametrize("size", [[6], [6, 0], [6, 2.0], [6, True], [6, 10, 10], "6"])
def test_a_checkpoints_manifest_with_another_size_is_damaged(size):
    with pytest.raises(BadFile, match="architecture: latent_size"):
        read_meta({"architecture": {"latent_size": size}}, 0, "here")


def test_the_grid_of_a_table_is_as_told_or_a_square_or_the_recipes():
    table = filled(WIDE).float().state_dict()
    assert infer(table, {"latent_size": [10, 6], "num_classes": 7}, 3, "file").latent_size == (10, 6)
    assert infer(table, {"num_classes": 7}, 3, "file", WIDE).latent_size == (6, 10)
    with pytest.raises(UserError, match="pos_embed has 15 tokens, which is no square, and nothing tells their grid"):
        infer(table, {"num_classes": 7}, 3, "file", replace(WIDE, latent_size=8))
    square = filled(replace(WIDE, latent_size=8)).float().state_dict()
    assert infer(square, {"latent_size": [8, True], "num_classes": 7}, 3, "file").latent_size == 8
