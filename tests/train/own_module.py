"""A module, a dataset and a recipe such as somebody else writes them, for tests of the Python API."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import st_fast
from st_fast import Recipe
from st_fast.model.own import Tapped

WIDTH, SIDE = 16, 4


class Block(nn.Module):
    """Attention and MLP without condition; drops some channels in training."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        h = h + self.dropout(self.out(nn.functional.scaled_dot_product_attention(q, k, v)))
        return h + self.mlp(h)


class Net(nn.Module):
    """Patches of 2 x 2 of a latent (3, 4, 4) through four blocks."""

    def __init__(self, dropout: float = 0.1, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.label, self.time = nn.Embedding(classes + 1, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.pixels = nn.ConvTranspose2d(WIDTH, 3, 2, 2)
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + (self.label(y) + self.time(t[:, None]))[:, None] * self.scale
        for block in self.blocks:
            h = block(h)
        return self.pixels(h.transpose(1, 2).unflatten(2, (2, 2)))


def tapped() -> Tapped:
    return st_fast.tap(Net(), "blocks")


class Items(torch.utils.data.Dataset):
    """A map-style dataset whose length can be changed."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(number)), number % 5


def tensors(count: int = 40) -> tuple[Tensor, Tensor]:
    """The same records as tensors."""
    items = Items(count)
    return torch.stack([items[n][0] for n in range(count)]), torch.tensor([n % 5 for n in range(count)])


STAGES: list[dict[str, Any]] = [
    {"name": "align", "supervision": "velocity_head", "depth": 1, "steps": 3, "hidden": 8},
    {
        "name": "transcend", "supervision": "self_transcendence", "teacher": "align", "student_depth": 2,
        "teacher_depth": 3, "cfg_scale": 3.0, "t_range": [0.1, 0.9], "steps": 3, "hidden": 8,
    },
]  # fmt: skip


def recipe(out: Path, stages: list[dict[str, Any]] | None = None, **tables: dict[str, Any]) -> Recipe:
    """A recipe for them: two stages of three steps."""
    given = {
        "model": {"network": "own", "channels": 3, "latent_size": SIDE, "num_classes": 5},
        "optim": {"batch_size": 8, "lr": 1e-2, "ema_decay": 0.9},
        "run": {"out": str(out), "device": "cpu", "log_every": 1},
        "sample": {"sampler": "heun", "steps": 2, "num": 0},
    }
    for name, table in tables.items():
        given[name] = given.get(name, {}) | table
    return st_fast.make_recipe(stage=[dict(stage) for stage in stages or STAGES], **given)


def main(out: Path) -> None:
    """As a program under torchrun: weights of its own, which each rank draws anew."""
    torch.set_num_threads(1)
    st_fast.Trainer(recipe(out), model=st_fast.tap(Net(dropout=0.0), "blocks"), data=Items()).fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
