"""The published training loop, written plainly: what st_fast's step is compared with.

It follows docs/method.md and, for what costs time, the loop released with arXiv 2601.07773 (and REPA's, which it grew
from): eager blocks with PyTorch's own attention and qk-norm; the teacher on all samples, with both branches as one
batch of 2B, outside autocast in float32 (TF32 allowed on CUDA, as the published commands do), up to the block it needs
and at every step; heads on all samples; `AdamW` and `clip_grad_norm_` as they are by default; the weight average
parameter by parameter; three values read back from the device every step. Two things are kinder than the original: bf16
on CUDA (fp16 with a loss scaler there), and no training image is decoded and thrown away.

Its networks are those of `bench.plain`.

    python -m bench.published S/2 "stage 2" 8 256 0 2 plain     (size, stage, batch, tokens, depth, threads, which)

is the loop in a process of its own, with the C library's memory settings as they are found: it answers every line on
its standard input with one step's seconds. st_fast keeps freed memory with its process (`st_fast.kernels.heap`); a
rival in that process would gain from it. The published loop sets nothing, so on a CPU it is measured in a subprocess.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import Stopwatch, Variant
from bench.plain import PlainNetwork, plain_network
from bench.workload import Ours, Setup, ours
from st_fast.recipe.methods import SelfTranscendence, VelocityHead
from st_fast.recipe.schema import Model, Recipe, Stage

ROOT = Path(__file__).resolve().parent.parent


class VelocityOutput(nn.Module):
    """Stage 1's head: the projector, a LayerNorm without affine, and a linear layer to patches (B, N, p·p·C)."""

    def __init__(self, projectors: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.projectors, self.linear = projectors, linear

    def forward(self, x: Tensor) -> Tensor:
        z = self.projectors(x)
        return self.linear(F.layer_norm(z, z.shape[-1:], eps=1e-6))


@dataclass(frozen=True)
class Draws:
    """What is random in a step: latents, noise, times and the student's condition."""

    x: Tensor
    noise: Tensor
    t: Tensor
    condition: Tensor
    student_condition: Tensor


class PlainLoop:
    """A stage's step, plainly: `model` and `heads` are st_fast's, whose weights it starts from."""

    def __init__(self, recipe: Recipe, stage: Stage, model: nn.Module, heads: nn.Module, teacher: nn.Module | None,
                 scale: float, device: torch.device) -> None:  # fmt: skip
        self.recipe, self.method, self.scale, self.device = recipe, stage.method, scale, device
        self.model = _loaded(recipe.model, model, device)
        tap = stage.method.tap
        assert isinstance(tap, int)  # of the methods in `STAGES`: one block is supervised
        self.model.tap, self.model.head = tap, _head(stage, heads)
        self.teacher: PlainNetwork | None = None
        if teacher is not None:
            self.teacher = _loaded(recipe.model, teacher, device).eval().requires_grad_(False)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        optim = recipe.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True

    def compile(self, whole: bool) -> None:
        """Puts both networks under torch.compile: as one graph each, or block by block, which compiles in seconds."""
        for network in filter(None, (self.model, self.teacher)):
            for part in (network,) if whole else (*network.blocks, network.final_layer):
                part.compile(dynamic=False)

    def draw(self, moments: Tensor, condition: Tensor) -> Draws:
        """From moments (B, 2C, S, S) = concat(mean, std), with PyTorch's own generators; uniform t drawn on the CPU."""
        mean, std = moments.float().chunk(2, dim=1)
        x = self.scale * (mean + std * torch.randn_like(mean))
        t = torch.rand(len(x)).to(self.device)
        dropped = torch.rand(len(x), device=self.device) < self.recipe.model.class_dropout
        dropped = dropped.view(-1, *[1] * (condition.ndim - 1))
        student_condition = torch.where(dropped, self.model.null_like(condition), condition)
        return Draws(x, torch.randn_like(x), t, condition, student_condition)

    def autocast(self) -> AbstractContextManager[object]:
        """What the student's pass runs under: bf16 on CUDA."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def losses(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The denoising loss and the weighted auxiliary loss, means over the batch."""
        t = draws.t.view(-1, 1, 1, 1)
        x_t, velocity = (1 - t) * draws.x + t * draws.noise, draws.noise - draws.x
        with self.autocast():
            prediction, supervised = self.model(x_t, draws.t, draws.student_condition)
        denoise = (prediction.float() - velocity).square().mean((1, 2, 3)).mean()
        selection = self.method.selection
        if supervised is None or selection is None:
            return denoise, torch.zeros_like(denoise)
        mask = ((draws.t >= selection.t_range[0]) & (draws.t <= selection.t_range[1])).float()
        target = self._target(draws, x_t, velocity)
        errors = (supervised.float() - target).square().flatten(1).mean(1)
        return denoise, selection.weight * (mask * errors).mean()

    def _target(self, draws: Draws, x_t: Tensor, velocity: Tensor) -> Tensor:
        if isinstance(self.method, VelocityHead):
            wanted = velocity if self.method.target == "velocity" else draws.x
            side, p = wanted.shape[-1] // self.recipe.model.patch, self.recipe.model.patch
            grid = wanted.reshape(len(wanted), -1, side, p, side, p)
            return torch.einsum("nchpwq->nhwpqc", grid).reshape(len(wanted), side * side, -1)
        assert isinstance(self.method, SelfTranscendence) and self.teacher is not None
        if self.method.loss != "mse":
            raise ValueError(f"loss = {self.method.loss!r}: the released loop has mse alone")
        both = torch.cat([draws.condition, self.teacher.null_like(draws.condition)])
        with torch.no_grad():
            features, _ = self.teacher(
                torch.cat([x_t, x_t]), torch.cat([draws.t, draws.t]), both, until=self.method.teacher_depth
            )
        conditional, unconditional = features.chunk(2)
        return unconditional + self.method.cfg_scale * (conditional - unconditional)

    def step(self, moments: Tensor, condition: Tensor) -> dict[str, float]:
        """One step with its logging; returns what the loop would log, read back from the device."""
        return self.step_from(self.draw(moments, condition))

    def step_from(self, draws: Draws) -> dict[str, float]:
        """The step after its draws."""
        denoise, aux = self.losses(draws)
        (denoise + aux).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return {"loss": denoise.item(), "loss_fea": aux.item(), "grad_norm": norm.item()}

    @torch.no_grad()
    def _average(self) -> None:
        decay, averaged = self.recipe.optim.ema_decay, dict(self.ema.named_parameters())
        for name, parameter in self.model.named_parameters():
            averaged[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


def _loaded(config: Model, source: nn.Module, device: torch.device) -> PlainNetwork:
    """A plain network with the weights of st_fast's, every key of it, in float32."""
    with torch.device("meta"):  # nothing is drawn that is overwritten
        plain = plain_network(config)
    plain.to_empty(device=device)
    plain.load_state_dict({name: tensor.float() for name, tensor in source.state_dict().items()})
    return plain


def _head(stage: Stage, heads: nn.Module) -> nn.Module | None:
    """The stage's head, as a copy of st_fast's."""
    if isinstance(stage.method, SelfTranscendence):
        return copy.deepcopy(heads.get_submodule("projectors")).float()
    if isinstance(stage.method, VelocityHead):
        linear = heads.get_submodule("projectors_final.linear")
        return VelocityOutput(copy.deepcopy(heads.get_submodule("projectors")), copy.deepcopy(linear)).float()
    return None


def plain_loop(loop: Ours) -> PlainLoop:
    """The published loop from the same weights as st_fast's."""
    trainer, device = loop.trainer, loop.iterator.ranks.device
    teacher = getattr(trainer.method, "teacher", None)
    return PlainLoop(loop.recipe, loop.stage, trainer.model, trainer.method.heads, teacher, loop.scale, device)


def plain_variant(loop: PlainLoop, size: int, block: int) -> Variant:
    """`block` steps of `size` samples a round; its data are in the device's memory already."""
    model = loop.recipe.model
    moments = torch.randn(size, 2 * model.channels, *model.latent_sides, device=loop.device)
    condition = loop.model.some_condition(size, loop.device)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("step"):
            for _ in range(block):
                loop.step(moments, condition)

    return run


class Subprocess:
    """The loop in another process: `step()` has it make one step and returns its seconds."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def variant(self, block: int) -> Variant:
        """`block` steps a round, by the other process's own clock."""

        def run(number: int, watch: Stopwatch) -> None:
            watch.add("step", sum(self.step() for _ in range(block)))

        return run

    def step(self) -> float:
        """RuntimeError, with what the process said last, if it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RuntimeError("the published loop's process has ended; its own message is above") from error


@contextmanager
def in_subprocess(setup: Setup, which: str) -> Iterator[Subprocess]:
    """Starts the process, its first step made, and ends it on leaving. which: "plain", "compile", "compile whole"."""
    command = [sys.executable, "-m", "bench.published", setup.size, setup.stage, str(setup.batch), str(setup.tokens)]
    process = subprocess.Popen(
        [*command, str(setup.depth), str(torch.get_num_threads()), which],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        loop = Subprocess(process)
        loop.step()
        yield loop
    finally:
        process.kill()
        process.wait()


def main(arguments: Sequence[str]) -> None:
    """The process: one line of seconds for each line that comes."""
    size, stage, batch, tokens, depth, threads, which = arguments
    torch.set_num_threads(int(threads))
    setup = Setup(size, stage, int(batch), torch.device("cpu"), int(tokens), int(depth))
    with ours(setup) as loop:
        rival = plain_loop(loop)
        if "compile" in which:
            rival.compile(whole="whole" in which)
        run = plain_variant(rival, setup.batch, 1)
        for number, _ in enumerate(sys.stdin):
            watch = Stopwatch(setup.device)
            run(number, watch)
            print(watch.read()["step"][0], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
