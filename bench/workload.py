"""The step under measurement: st_fast's own StageTrainer, fed by its own loader, and the plain loop beside it.

Weights are random everywhere (published initialisation has zeros, which GPUs multiply faster), t is stratified, so
that every step supervises the same number of samples to ±1, and the data are random latents in a temporary folder, each
with the random states of a caption where the network is an MMDiT.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.measure import Row, Stopwatch, Variant
from st_fast.core.files import make_folder
from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopConsensus, StopRequest
from st_fast.data.ahead import RecordSet
from st_fast.data.loader import make_loader
from st_fast.data.manifest import Manifest, VaeInfo, write_manifest
from st_fast.data.shards import open_data
from st_fast.data.text import TextManifest, read_captions, text_folder
from st_fast.kernels import KernelTable
from st_fast.model import DiffusionTransformer, unfilled
from st_fast.model.attention import Attend
from st_fast.model.layers import sincos_positions
from st_fast.prepare.text import write_captions
from st_fast.prepare.writing import record_crcs, write_shards, write_tensors
from st_fast.recipe import Recipe, cost, load
from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.methods import DualTime, Method, Plain, SelfFlow, SelfTranscendence
from st_fast.recipe.routing import Routing
from st_fast.recipe.schema import Model, Stage
from st_fast.recipe.sizes import named_sizes
from st_fast.train import graphs
from st_fast.train.batches import BatchIterator, Lookahead
from st_fast.train.choices import choose_kernels
from st_fast.train.context import RunContext
from st_fast.train.examiner import Examiner
from st_fast.train.log import Log
from st_fast.train.memory import choose_micro_batch
from st_fast.train.run import precision
from st_fast.train.stage import try_graphs
from st_fast.train.trainer import StageTrainer

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("plain", "stage 1", "stage 2")
OF_ITS_OWN: dict[str, Callable[[Model], Method]] = {
    "Self-Flow": lambda model: SelfFlow(student_depth=round(0.3 * model.depth), teacher_depth=round(0.7 * model.depth)),
    "SRA with dual time": lambda model: DualTime(student_depth=model.depth // 4, teacher_depth=2 * model.depth // 3),
}
"""Stages whose teacher is the student's average, with the published blocks as shares of the depth."""
ROUTES: dict[str, Callable[[int], Routing]] = {
    "TREAD": lambda depth: Routing("tread") if depth > 5 else Routing("tread", route_first=1, route_last=depth - 1),
    "SPRINT": lambda depth: Routing("sprint") if depth > 5 else Routing("sprint", route_first=1, route_last=depth - 1),
}
"""Plain training under a route, with its published settings where the network has blocks enough."""
IN_RANGE = "stage 2 in range"
"""Stage 2 with the published t-range, which the recipe of text leaves off as the released scripts do."""
MANY_STEPS = 10**6
UNTRIED = ("--kernels.gelu_mlp=reference", "--run.cuda_graphs=false")
"""What a training run on CUDA decides by trials at its start, set to what "auto" is without one."""


MODERN = (
    "--model.norm=rms", "--model.position=both", "--model.mlp=swiglu", "--model.qk_norm=rms",
    "--model.value_residual=true",
)  # fmt: skip
"""The block of a network whose size begins with "modern "."""


@dataclass(frozen=True)
class Setup:
    """One step to measure. size: of a SiT, which may begin with "modern ", an MMDiT's whole name, whose blocks that
    supervise move with its depth, or "digits" for `make demo`'s own model with its tokens; tokens a latent; depth 0 is
    the size's own; compile as `run.compile` takes it.

    `options` go over the recipe; labels do not show them.
    """

    size: str
    stage: str
    batch: int
    device: torch.device
    tokens: int = 256
    depth: int = 0
    compile: str = "auto"
    options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        more = f", {self.tokens} tokens" * (self.tokens != 256) + f", depth {self.depth}" * (self.depth > 0)
        return f"{self.size}, {self.stage}, batch {self.batch}{more}"

    @property
    def untried(self) -> Setup:
        """The same without a trial, unless the options ask for one: for loops that are compared or counted."""
        return replace(self, options=(*UNTRIED, *self.options))


def make_recipe(setup: Setup, folder: Path) -> Recipe:
    """The shipped recipe of that size, with this batch, resolution, depth and folder."""
    demo, text, size = setup.size == "digits", setup.size.startswith("MMDiT"), setup.size.removeprefix("modern ")
    name = "digits" if demo else "mmdit_coco" if text else f"sit_{size.split('/')[0].lower()}"
    own = ["--evaluate.classifier=false"] if demo else [f"--model.latent_size={2 * math.isqrt(setup.tokens)}"]
    own += MODERN if size != setup.size else []
    recipe = load(
        ROOT / "recipes" / f"{name}.toml",
        [
            f"--data.path={folder / 'data'}", f"--run.out={folder / 'run'}", "--data.loader=resident",
            f"--run.device={setup.device.type}", "--run.precision=auto", "--flow.time=stratified",
            f"--run.compile={setup.compile}",
            f"--optim.batch_size={setup.batch}", "--optim.micro_batch=0", *own, *setup.options,
        ],
    )  # fmt: skip
    if text:
        sizes = named_sizes(setup.size)
        share = sizes["depth"] / recipe.model.depth
        recipe = _resized(recipe, sizes | {"name": setup.size}, lambda block: max(1, round(block * share)))
    if not setup.depth:
        return recipe
    return _resized(recipe, {"name": "custom", "depth": setup.depth}, lambda block: min(block, setup.depth))


def _resized(recipe: Recipe, sizes: Mapping[str, Any], moved: Callable[[int], int]) -> Recipe:
    """The recipe with another network, and the blocks that its methods name where `moved` puts them."""

    def within(method: Any) -> Any:
        names = ("student_depth", "teacher_depth") if isinstance(method, SelfTranscendence) else ("depth",)
        return replace(method, **{name: moved(getattr(method, name)) for name in names})

    stages = tuple(replace(stage, method=within(stage.method)) for stage in recipe.stages)
    return replace(recipe, model=replace(recipe.model, **sizes), stages=stages)


def make_stage(setup: Setup, recipe: Recipe) -> Stage:
    """The stage that `setup.stage` names, without an end."""
    if setup.stage == "plain":
        return Stage("plain", Plain(), MANY_STEPS)
    if setup.stage in ROUTES:
        return Stage("stage", Plain(), MANY_STEPS, routing=ROUTES[setup.stage](recipe.model.depth))
    if setup.stage in OF_ITS_OWN:
        return Stage("stage", OF_ITS_OWN[setup.stage](recipe.model), MANY_STEPS)
    if setup.stage == IN_RANGE:
        stage = make_stage(replace(setup, stage="stage 2"), recipe)
        assert isinstance(stage.method, SelfTranscendence)
        return replace(stage, method=replace(stage.method, t_range=SelfTranscendence.t_range))
    stage = recipe.stages[STAGES.index(setup.stage) - 1]
    method = replace(stage.method, stop_step=0) if isinstance(stage.method, SelfTranscendence) else stage.method
    return replace(stage, method=method, steps=MANY_STEPS)


def write_data(recipe: Recipe) -> RecordSet:
    """Random latents for the recipe, on the disk, and what else its network is conditional on."""
    model, folder = recipe.model, Path(recipe.data.path)
    shape = (2 * model.channels, *model.latent_sides)
    count = max(64, 2 * recipe.optim.batch_size)
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(count, *shape, generator=generator)
    moments[:, model.channels :].abs_().mul_(0.1)
    labels = torch.randint(model.num_classes, (count,), generator=generator)
    manifest = Manifest(0, shape, "float16", 0.18215, VaeInfo("none"), "random", model.num_classes)
    write_shards(folder, [(moments.half(), labels)], manifest)
    records = open_data(folder, verify=False)
    if model.network == "mmdit":
        states = torch.randn(1 + count, 1, model.text_length, model.text_width, generator=generator).half()
        write_captions(folder, [["some text"]] * count)
        write_random_text(folder, records.digest, states.numpy())
    return records


def write_random_text(folder: Path, latents: str, states: np.ndarray) -> None:
    """States (n, 1, L, W) that no encoder made: of the empty caption and of one caption of each of the latents."""
    where, (_, captions) = text_folder(folder, "random"), read_captions(folder)
    make_folder(where)
    crcs = record_crcs(states, np.arange(len(states)))
    shard = write_tensors(where / "text-00000.safetensors", {"states": states, "crc32": crcs})
    shape = (1, *states.shape[2:])
    write_manifest(
        where, TextManifest("random", "0" * 64, shape, False, captions, latents, len(states), shards=(shard,))
    )


class Notices(Log):
    """A log that writes nothing and keeps what is said: a kernel, a compiler or a backend that was given up."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        super().__init__(folder / "log.jsonl", ranks)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


WEIGHT_STD = 0.03
"""Of weights under measurement; about what Xavier's rule gives at XL/2."""


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], config: Model, seed: int) -> None:
    """Draws trained weights on their own device, none of them zero; positions and norms' scales are what they are."""
    drawn = {device: torch.Generator(device).manual_seed(seed) for device in {t.device for t in tensors.values()}}
    for name, tensor in tensors.items():
        if name == "pos_embed":
            tensor.copy_(sincos_positions(config.width, config.grid))
            continue
        tensor.normal_(std=WEIGHT_STD, generator=drawn[tensor.device])
        if name.endswith(("norm.weight", "ln_q.weight", "ln_k.weight")):
            tensor.add_(1.0)


def fill_trainer(trainer: StageTrainer) -> None:
    """The same for a trainer's model and heads; its average begins there."""
    groups, config = trainer.optimizer.state(), trainer.context.recipe.model
    for seed, name in enumerate(("model", "heads"), start=1):
        fill(groups.get(name, {}), config, seed)
    for name, average in groups["ema"].items():
        average.copy_(groups["model"][name])
    trainer.optimizer.follow()


def _filled_teacher(
    root: Path, config: Model, weights: str, table: KernelTable, place: torch.device, dtype: torch.dtype,
    attend: Attend, **_: Any,
) -> DiffusionTransformer:  # fmt: skip
    """In place of `stored.load_frozen`: a teacher of this size whose weights no checkpoint holds."""
    model = unfilled(config, table, place, dtype, attend)
    fill(model.state_dict(), config, seed=3)
    return model.eval().requires_grad_(False)


@contextmanager
def quickly_built(device: torch.device) -> Iterator[None]:
    """Trainers made here draw no weights, which `fill_trainer` does on the device, and read no teacher from a disk.

    For XL/2 that leaves a second of 14, and of 60 with a teacher.
    """

    def build(config: Model, table: KernelTable, seed: int, attend: Attend) -> DiffusionTransformer:
        return unfilled(config, table, device, torch.float32, attend)

    with patch("st_fast.train.trainer.build", build), patch("st_fast.model.stored.load_frozen", _filled_teacher):
        yield


class Ours:
    """st_fast's loop over one stage, with what a run's trials decide at its start: data and step, all but a few
    scalars of what happens between log lines."""

    def __init__(self, setup: Setup, folder: Path, write: Callable[[Recipe], RecordSet] = write_data) -> None:
        """write: makes the data."""
        ranks, given = Ranks(0, 1, setup.device), make_recipe(setup, folder)
        dtype = precision(given, setup.device)
        recipe, _ = choose_micro_batch(given, ranks, dtype, kept=(0, 0), say=lambda text: None)
        self.stage = make_stage(setup, recipe)
        shards, self.log = write(recipe), Notices(folder, ranks)
        self.scale = shards.manifest.scale
        self.decided: list[str] = []
        """What the trials said."""
        timed = choose_kernels(recipe, ranks, dtype, self.decided.append)
        choice = graphs.settled(recipe, self.stage, ranks, self.decided.append)
        recipe = graphs.with_graphs(recipe, choice is None or choice.used)
        examiner = Examiner(recipe, shards.manifest, ranks, self.log)
        stop = StopConsensus(StopRequest(), ranks)
        context = RunContext(recipe, ranks, shards, examiner, self.log, stop, dtype, rate=1.0, timed=timed)
        with quickly_built(setup.device):
            self.trainer = StageTrainer(context, self.stage)
        fill_trainer(self.trainer)
        loader = make_loader(recipe.data.loader, shards, setup.device, self.log.say)
        self.trainer.conditions.open(setup.device, self.log.say)
        if choice is None:
            recipe, _ = try_graphs(self.trainer, recipe, (loader,), first=0, say=self.decided.append)
        self.recipe = recipe
        draw, conditions = self.trainer.noisy_latents, self.trainer.conditions
        self.iterator = BatchIterator(recipe, self.stage, loader, shards, ranks, draw=draw, conditions=conditions)
        self._batches = Lookahead(self.iterator.steps(0, MANY_STEPS))
        self.trainer.step.following = self._batches.peek
        self.done = self.supervised = 0

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass."""
        return images_a_pass(self.recipe.optim, ranks=1)

    @property
    def waited(self) -> float:
        """Seconds waited for data so far."""
        return self.iterator.waited

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """One step; its denoising and auxiliary losses and the gradients' norm, on the device."""
        batches = next(self._batches)
        losses, norm = self.trainer.step(self.done, batches)
        self.done += 1
        self.supervised += sum(len(batch.rows.index) for batch in batches)
        return losses.denoise, losses.aux, norm

    @property
    def flops(self) -> float:
        """Of one step of the method as defined, at the expected number of supervised samples."""
        return self.recipe.optim.batch_size * cost.stage_cost(self.recipe, self.stage).total


@contextmanager
def ours(setup: Setup) -> Iterator[Ours]:
    """st_fast's loop in a folder that goes when it is done."""
    with TemporaryDirectory(prefix="st_fast-bench-") as folder:
        loop = Ours(setup, Path(folder))
        try:
            yield loop
        finally:
            loop.trainer.close()


def decisions(loop: Ours) -> Row:
    """For a row: what the trials at the loop's start said."""
    return {"decided": loop.decided} if loop.decided else {}


def our_variant(loop: Ours, block: int) -> Variant:
    """`block` steps a round."""

    def run(number: int, watch: Stopwatch) -> None:
        with watch("step"):
            for _ in range(block):
                loop()

    return run


def main(arguments: Sequence[str]) -> None:
    """A start, timed: prints seconds from `began`, by time.monotonic(), to the end of each part as a line of JSON."""
    size, stage, batch, device, began, *options = arguments
    ends = [time.monotonic()]
    with ours(Setup(size, stage, int(batch), torch.device(device), options=tuple(options))) as loop:
        ends.append(time.monotonic())
        for _ in range(2):
            loop()
            if loop.iterator.ranks.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.monotonic())
    parts = zip(("import", "build", "first_step", "second_step"), [float(began), *ends], ends, strict=False)
    print(json.dumps({name: end - start for name, start, end in parts}))


if __name__ == "__main__":
    main(sys.argv[1:])
