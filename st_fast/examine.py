"""Looks at a model while it trains: pictures from fixed noise and labels, and metrics of its samples."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from st_fast import evaluate, pictures
from st_fast.data.shards import Manifest
from st_fast.judge import Judge
from st_fast.model import SiT
from st_fast.monitor import Log
from st_fast.parallel import Ranks
from st_fast.recipe.schema import Recipe, Stage
from st_fast.sample import sample_batches

GRID_COLUMNS = 10


class Examiner:
    """Draws and judges on the first rank; what it needs (decoder, judge) is loaded when first asked for."""

    def __init__(self, recipe: Recipe, manifest: Manifest, ranks: Ranks, log: Log) -> None:
        self.recipe, self.manifest, self.ranks, self.log = recipe, manifest, ranks, log
        self._decode: pictures.Decode | None = None
        self._judge: tuple[Judge, evaluate.Reference] | None = None

    def images(self, model: SiT, count: int) -> tuple[Tensor, Tensor]:
        """uint8 images (count, 1 or 3, H, W) and their labels (count,), on the CPU."""
        if self._decode is None:
            self._decode = pictures.decoder(Path(self.recipe.data.path), self.manifest, self.ranks.device)
        settings, images, labels = self.recipe.sample, [], []
        for latents, asked in sample_batches(model, self.recipe.run.seed, count, settings, self.recipe.flow.path):
            self.ranks.place.mark("sample")
            images.append(self._decode(latents).cpu())
            labels.append(asked.cpu())
        return torch.cat(images), torch.cat(labels)

    def pictures(self, model: SiT, stage: Stage, step: int, cost: dict[str, float]) -> None:
        """A grid of samples into the stage's folder, of the same noise every time; none if `sample.num` is 0."""
        if self.recipe.sample.num == 0 or not self.ranks.first:
            return
        images, _ = self.images(model, self.recipe.sample.num)
        name = f"{stage.name}/samples/{step:08d}.png"
        pictures.save_png(pictures.grid(images, GRID_COLUMNS), Path(self.recipe.run.out) / name)
        self.log.write("sample", stage.name, step, file=name, **cost)

    def metrics(self, model: SiT, stage: Stage, step: int, cost: dict[str, float]) -> None:
        """The judge's metrics into the log, if the recipe names a judge."""
        if self.recipe.evaluate.judge == "none" or not self.ranks.first:
            return
        if self._judge is None:
            self._judge = evaluate.load_judge(Path(self.recipe.data.path), self.log.say)
        images, labels = self.images(model, self.recipe.evaluate.num)
        found = evaluate.judge_samples(self._judge[0], images, labels, self._judge[1])
        settings = self.recipe.sample
        protocol = {"cfg_scale": settings.cfg_scale, "sampler": settings.sampler, "steps": settings.steps}
        self.log.write("eval", stage.name, step, metrics=found | protocol, **cost)
        self.log.say(line(stage.name, step, found))


def line(stage: str, step: int, found: dict[str, object]) -> str:
    """The judge's verdict in one line."""
    accuracy, distance, floor = (float(str(found[key])) for key in ("accuracy", "frechet", "floor_frechet"))
    recognised = f"{100 * accuracy:.1f} % of {found['num']} samples recognised"
    return f"{stage} {step}: {recognised}, Fréchet distance {distance:.2f} (real held-out images: {floor:.2f})"
