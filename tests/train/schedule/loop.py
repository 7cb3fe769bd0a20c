"""A stage's own trainer and iterator, step by step, for the tests of its schedules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopConsensus, StopRequest
from st_fast.data.loader import make_loader
from st_fast.data.shards import open_data
from st_fast.recipe import load
from st_fast.train.batches import BatchIterator, Lookahead
from st_fast.train.context import RunContext
from st_fast.train.examiner import Examiner
from st_fast.train.log import Clock, Log
from st_fast.train.run import precision
from st_fast.train.trainer import StageTrainer
from tests import tiny


class Loop:
    """The stage `name` of the tiny recipe with these options, in a folder where its teacher is."""

    def __init__(self, folder: Path, name: str, options: tuple[str, ...] = (), device: str = "cpu") -> None:
        recipe = load(folder / "tiny.toml", [f"--run.device={device}", *options])
        ranks = Ranks(0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))
        shards, log = open_data(Path(recipe.data.path), verify=False), Log(folder / "log.jsonl", ranks)
        log.say = self._say  # type: ignore[method-assign]
        self.said: list[str] = []
        examiner, consensus = Examiner(recipe, shards.manifest, ranks, log), StopConsensus(StopRequest(), ranks)
        dtype = precision(recipe, ranks.device)
        context = RunContext(recipe, ranks, shards, examiner, log, consensus, dtype, rate=1.0)
        self.stage = recipe.stage(name)
        self.trainer = StageTrainer(context, self.stage)
        _enliven(self.trainer)
        loader = make_loader("resident", shards, ranks.device, log.say)
        self.iterator = BatchIterator(recipe, self.stage, loader, shards, ranks)

    def _say(self, text: str) -> None:
        self.said.append(text)

    def steps(self, first: int = 0, last: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Denoising loss, supervision's loss and gradient norm of each step."""
        batches = Lookahead(self.iterator.steps(first, self.stage.steps if last is None else last))
        self.trainer.step.following = batches.peek
        for number, one in enumerate(batches, start=first):
            losses, norm = self.trainer.step(number, one)
            yield losses.denoise, losses.aux, norm

    def run(self) -> tuple[list[tuple[Tensor, ...]], dict[str, Tensor]]:
        """All steps' numbers, and the state after them."""
        numbers = list(self.steps())
        state = self.trainer.optimizer.state()
        return numbers, {f"{g}/{k}": t.clone() for g, tensors in state.items() for k, t in tensors.items()}


@torch.no_grad()
def _enliven(trainer: StageTrainer) -> None:
    """Moves all weights off the published zeros, which would hide most of the network."""
    groups, generator = trainer.optimizer.state(), torch.Generator().manual_seed(1)
    for name in ("model", "heads"):
        for tensor in groups.get(name, {}).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.device))
    trainer.optimizer.follow()


def with_teacher(folder: Path) -> Path:
    """The folder with data, the tiny recipe and a checkpoint of its first stage with random weights."""
    recipe = tiny.write_recipe(folder / "tiny.toml", tiny.write_data(folder / "latents"), folder / "out")
    recipe.write_text(recipe.read_text() + '[[stage]]\nname = "plain"\nsupervision = "none"\nsteps = 10\n')
    teacher = Loop(folder, "align").trainer
    teacher.save(1, Clock())
    teacher.finish()
    return folder
