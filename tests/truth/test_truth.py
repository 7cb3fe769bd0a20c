"""Training from stored moments to updated weights, three steps of every method and mask, against `program.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from st_fast.core import random
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.kernels import SWITCHES
from st_fast.prepare.features import write_features
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load
from st_fast.train.run import run
from st_fast.train.step import Step
from st_fast.train.trainer import StageTrainer
from tests.train.supervision.encoders import Pictures
from tests.truth import program
from tests.truth.program import Method, Setting, State

SCALE, RECORDS, CLASSES, BATCH, STEPS, SEED = 0.18215, 13, 7, 6, 3, 2**33 + 5
"""13 records in batches of 6: the second epoch begins within the third step."""

RECIPE = """
[model]
depth = 3
width = 48
heads = 3
patch = 2
channels = 4
latent_size = 8
num_classes = 7
class_dropout = 0.3
qk_norm = {qk_norm}
modulation = "{modulation}"
[flow]
path = "{path}"
time = "{time}"
[data]
path = "{data}"
loader = "resident"
[optim]
batch_size = 6
accumulation = {accumulation}
lr = 3e-3
warmup_steps = 2
betas = [0.8, 0.9]
eps = 1e-3
weight_decay = 0.7
grad_clip = {clip}
ema_decay = 0.6
[run]
out = "{out}"
seed = {seed}
device = "cpu"
supervised_rows = "{rows}"
log_every = 1
save_every = 10
[sample]
num = 0
[kernels]
{kernels}
"""


@dataclass(frozen=True)
class Case:
    """What a recipe says, and the same for the program."""

    stages: str
    methods: tuple[Method, ...]
    path: str = "linear"
    time: str = "uniform"
    qk_norm: bool = True
    modulation: str = "per_block"
    accumulation: int = 1
    rows: str = "auto"
    clip: float = 1.0
    kernels: str = "auto"
    """Or "reference": the plain definitions, where "auto" on a CPU takes csrc."""
    teacher_group: str = "model"


def stage(name: str, supervision: str, **keys: Any) -> str:
    """A stage's table."""

    def written(value: Any) -> str:
        return (
            str(value).lower() if isinstance(value, bool) else repr(list(value) if isinstance(value, tuple) else value)
        )

    lines = [f"{key} = {written(value)}" for key, value in keys.items()]
    return "\n".join(
        ["[[stage]]", f'name = "{name}"', f'supervision = "{supervision}"', f"steps = {STEPS}", *lines, ""]
    )


def routed(first: int, last: int, rate: float, select: str = "random") -> dict[str, Any]:
    """TREAD's keys."""
    return {"route": "tread", "route_first": first, "route_last": last, "route_rate": rate, "route_select": select}


def fused(rate: float, select: str = "random", path_drop: float = 0.3, **more: Any) -> dict[str, Any]:
    """SPRINT's keys, around the second of three blocks."""
    return routed(1, 2, rate, select) | {"route": "sprint", "path_drop": path_drop} | more


ROUTES = {"first": "route_first", "last": "route_last", "rate": "route_rate"}


def two_stages(one: dict[str, Any], two: dict[str, Any], weights: str = "raw", **settings: Any) -> Case:
    """Stage 1 and stage 2 of Self-Transcendence, with these keys."""
    first = {"depth": 1, "hidden": 20, "weight": 0.7} | one
    second = {"student_depth": 1, "teacher_depth": 2, "cfg_scale": 3.5, "hidden": 20, "weight": 0.3} | two
    text = ""
    for name, supervision, keys in (
        ("align", "velocity_head", first),
        ("transcend", "self_transcendence", second | {"teacher": "align", "teacher_weights": weights}),
    ):
        written = {ROUTES.get(key, key): value for key, value in keys.items()}
        text += stage(name, supervision, **written, **({"route": "tread"} if "last" in keys else {}))
    renamed = {("depth" if key == "student_depth" else key): value for key, value in second.items()}
    methods = tuple(
        Method(name, **{key: value for key, value in keys.items() if key != "hidden"})
        for name, keys in (("velocity_head", first), ("self_transcendence", renamed))
    )
    return Case(text, methods, teacher_group="model" if weights == "raw" else "ema", **settings)


class Numbers:
    """The draws of a run, from the program's own generator: purposes as the format numbers them."""

    def __init__(self, time: str, path: str) -> None:
        self._time, self._path = time, path

    def _uniform(self, purpose: int, sample: int, place: int = 0) -> float:
        return ((program.words(SEED, purpose, sample, place + 1)[place] >> 8) + 0.5) / 2**24

    def record(self, sample: int) -> int:
        epoch, place = divmod(sample, RECORDS)
        return int(program.permutation(SEED, 7, epoch, RECORDS)[place])

    def time(self, step: int, sample: int, group: int = 0) -> float:
        purpose, place = (16, group - 1) if group else (3, 0)
        if self._time == "lognormal":
            sigma = math.exp(program.normals(SEED, purpose, sample, (place + 1,))[place].item())
            return sigma / (1 + sigma) if self._path == "linear" else 2 / math.pi * math.atan(sigma)
        u = self._uniform(purpose, sample, place)
        if self._time == "stratified":
            return (program.permutation(SEED, 6, step, BATCH, group)[sample - step * BATCH] + u) / BATCH
        return u

    def whole(self, sample: int) -> float:
        return self._uniform(15, sample)

    def chance(self, sample: int) -> float:
        return self._uniform(4, sample)

    def posterior(self, sample: int, shape: tuple[int, ...]) -> Tensor:
        return program.normals(SEED, 2, sample, shape)

    def noise(self, sample: int, shape: tuple[int, ...]) -> Tensor:
        return program.normals(SEED, 1, sample, shape)

    def offset(self, sample: int, group: int = 0) -> float:
        return self._uniform(11, sample, group)

    def path(self, sample: int) -> float:
        return self._uniform(18, sample)

    def keys(self, sample: int, count: int) -> list[float]:
        return [((word >> 8) + 0.5) / 2**24 for word in program.words(SEED, 14, sample, count)]


def drawn_times() -> list[float]:
    """The uniform times of the run's samples that float32 holds exactly, sorted."""
    numbers = Numbers("uniform", "linear")
    times = [numbers.time(number // BATCH, number) for number in range(STEPS * BATCH)]
    return sorted(time for time in times if float(np.float32(time)) == time)


RANGE = {"t_range": (0.2, 0.75)}
DRAWN = {"t_range": (drawn_times()[2], drawn_times()[-3])}
"""Both of its ends are times of samples, which are supervised."""
CASES = {
    "velocity, mse, sample": two_stages(
        {"target": "velocity", "mask": "sample", **DRAWN}, {"loss": "mse", "mask": "sample", **DRAWN},
        accumulation=2, clip=1.4, kernels="reference",
    ),
    "latent, cosine, released, until step 2": two_stages(
        {"target": "latent", "mask": "released", **RANGE},
        {"loss": "cosine", "mask": "released", "stop_step": 2, **RANGE},
        weights="ema", path="cosine", time="stratified", modulation="one", accumulation=3,
    ),
    "velocity, normalized_mse, sample_mean, padded": two_stages(
        {"target": "velocity", "mask": "sample_mean", **RANGE},
        {"loss": "normalized_mse", "mask": "sample_mean", "student_depth": 3, "teacher_depth": 3, **RANGE},
        time="lognormal", qk_norm=False, accumulation=2, rows="padded", clip=0.0,
    ),
    "the others": Case(
        stage("plain", "none")
        + stage("sync", "layer_sync", student_depth=1, teacher_depth=3, weight=0.6)
        + stage("sra", "sra", student_depth=1, teacher_depth=2, weight=0.9, decay_start=1, decay_steps=3)
        + stage("repa", "repa", encoders=("one", "two"), depth=2, hidden=20, weight=0.8, stop_step=2)
        + stage("sra-cosine", "sra", student_depth=2, teacher_depth=3, weight=0.4, loss="cosine", time_offset=0.5)
        + stage("internal", "internal_guidance", depth=2, weight=0.7),
        (
            Method("none"),
            Method("layer_sync", depth=1, teacher_depth=3, weight=0.6),
            Method("sra", depth=1, teacher_depth=2, weight=0.9, decay_start=1, decay_steps=3, loss="smooth_l1"),
            Method("repa", depth=2, weight=0.8, stop_step=2),
            Method("sra", depth=2, teacher_depth=3, weight=0.4, loss="cosine", time_offset=0.5),
            Method("internal_guidance", depth=2, weight=0.7),
        ),
        path="cosine", time="lognormal", kernels="reference",
    ),
    "guided targets": Case(
        stage("guided", "internal_guidance", depth=1, weight=0.4, target_guidance=0.6),
        (Method("internal_guidance", depth=1, weight=0.4, target_guidance=0.6),),
        modulation="one", accumulation=2,
    ),
    "a route before, around and behind what is compared": Case(
        stage("plain", "none", **routed(0, 2, 0.4))
        + stage("align", "velocity_head", depth=2, hidden=20, weight=0.7, t_range=RANGE["t_range"], **routed(1, 2, 0.3))
        + stage("transcend", "self_transcendence", teacher="align", student_depth=2, teacher_depth=3, cfg_scale=3.5,
                hidden=20, weight=0.3, t_range=RANGE["t_range"], **routed(1, 3, 0.75, "structured"))
        + stage("sync", "layer_sync", student_depth=1, teacher_depth=3, weight=0.6, **routed(1, 3, 0.5))
        + stage("sync-back", "layer_sync", student_depth=1, teacher_depth=2, weight=0.6, **routed(0, 1, 0.5))
        + stage("sra", "sra", student_depth=1, teacher_depth=2, weight=0.9, **routed(0, 1, 0.5))
        + stage("repa", "repa", encoders=("one", "two"), depth=2, hidden=20, weight=0.8, **routed(1, 2, 0.6))
        + stage("repa-before", "repa", encoders=("one", "two"), depth=1, hidden=20, weight=0.8, **routed(1, 2, 0.5))
        + stage("repa-behind", "repa", encoders=("one", "two"), depth=3, hidden=20, weight=0.8, dense_after=2,
                **routed(1, 2, 0.5)),
        (
            Method("none", first=0, last=2, rate=0.4),
            Method("velocity_head", depth=2, weight=0.7, **RANGE, first=1, last=2, rate=0.3),
            Method("self_transcendence", depth=2, teacher_depth=3, cfg_scale=3.5, weight=0.3, **RANGE, first=1, last=3,
                   rate=0.75, structured=True),
            Method("layer_sync", depth=1, teacher_depth=3, weight=0.6, first=1, last=3),
            Method("layer_sync", depth=1, teacher_depth=2, weight=0.6, first=0, last=1),
            Method("sra", depth=1, teacher_depth=2, weight=0.9, first=0, last=1, loss="smooth_l1"),
            Method("repa", depth=2, weight=0.8, first=1, last=2, rate=0.6),
            Method("repa", depth=1, weight=0.8, first=1, last=2),
            Method("repa", depth=3, weight=0.8, first=1, last=2, dense_after=2),
        ),
        accumulation=2,
    ),
    "a route with a fusion, and a dense end": Case(
        stage("plain", "none", **fused(0.75, "structured", path_drop=0.0))
        + stage("dense", "none", **fused(0.4, path_drop=0.5, dense_after=1))
        + stage("align", "velocity_head", depth=2, hidden=20, weight=0.7, t_range=RANGE["t_range"], **fused(0.5))
        + stage("repa", "repa", encoders=("one", "two"), depth=3, hidden=20, weight=0.8, **fused(0.5)),
        (
            Method("none", first=1, last=2, rate=0.75, structured=True, fused=True),
            Method("none", first=1, last=2, rate=0.4, fused=True, path_drop=0.5, dense_after=1),
            Method("velocity_head", depth=2, weight=0.7, **RANGE, first=1, last=2, fused=True, path_drop=0.3),
            Method("repa", depth=3, weight=0.8, first=1, last=2, fused=True, path_drop=0.3),
        ),
        accumulation=2, modulation="one",
    ),
    "several times in an image": Case(
        stage("flow", "self_flow", student_depth=1, teacher_depth=2, weight=0.9, mask_ratio=0.3)
        + stage("dual", "sra_dual", student_depth=1, teacher_depth=2, weight=0.7, time_offset=0.5)
        + stage("three", "sra_dual", student_depth=2, teacher_depth=3, weight=0.6, groups=(0.2, 0.3, 0.5),
                full_sample_prob=0.4, teacher_time="self_flow"),
        (
            Method("self_flow", depth=1, teacher_depth=2, weight=0.9, shares=(0.7, 0.3)),
            Method("sra_dual", depth=1, teacher_depth=2, weight=0.7, time_offset=0.5, shares=(0.25, 0.75),
                   separated=True),
            Method("sra_dual", depth=2, teacher_depth=3, weight=0.6, shares=(0.2, 0.3, 0.5), separated=True, whole=0.4,
                   teacher_time="self_flow"),
        ),
        path="cosine", time="stratified",
    ),
    "several times, all tokens attending to all": Case(
        stage("lowest", "sra_dual", student_depth=2, teacher_depth=3, weight=0.6, separated=False,
              teacher_time="self_flow")
        + stage("same", "sra_dual", student_depth=1, teacher_depth=3, weight=0.8, separated=False,
                teacher_time="same", full_sample_prob=0.5)
        + stage("flow", "self_flow", student_depth=3, teacher_depth=1, weight=0.9),
        (
            Method("sra_dual", depth=2, teacher_depth=3, weight=0.6, shares=(0.25, 0.75), teacher_time="self_flow"),
            Method("sra_dual", depth=1, teacher_depth=3, weight=0.8, shares=(0.25, 0.75), teacher_time="same",
                   whole=0.5),
            Method("self_flow", depth=3, teacher_depth=1, weight=0.9, shares=(0.75, 0.25)),
        ),
        time="lognormal", qk_norm=False, modulation="one", accumulation=2, kernels="reference", rows="padded",
    ),
    "a route through groups": Case(
        stage("flow", "self_flow", student_depth=2, teacher_depth=3, weight=0.9, **routed(1, 2, 0.5))
        + stage("dual", "sra_dual", student_depth=1, teacher_depth=2, weight=0.7, full_sample_prob=0.4,
                **routed(1, 3, 0.4))
        + stage("fused", "sra_dual", student_depth=2, teacher_depth=3, weight=0.7, **fused(0.5)),
        (
            Method("self_flow", depth=2, teacher_depth=3, weight=0.9, shares=(0.75, 0.25), first=1, last=2),
            Method("sra_dual", depth=1, teacher_depth=2, weight=0.7, shares=(0.25, 0.75), separated=True, whole=0.4,
                   first=1, last=3, rate=0.4),
            Method("sra_dual", depth=2, teacher_depth=3, weight=0.7, shares=(0.25, 0.75), separated=True, first=1,
                   last=2, rate=0.5, fused=True, path_drop=0.3),
        ),
        accumulation=2,
    ),
    "padded rows under a route": two_stages(
        {"first": 0, "last": 2, "rate": 0.5, **RANGE}, {"first": 0, "last": 2, "rate": 0.5, **RANGE},
        rows="padded", accumulation=2, modulation="one", qk_norm=False,
    ),
}  # fmt: skip


class Patches:
    """Stands for an image encoder: a fixed projection of each of 4 × 4 patches, in steps that float16 holds."""

    def __init__(self, name: str, width: int) -> None:
        self.name, self.hash, self.width = name, name, width
        self.matrix = torch.randn(48, width, generator=torch.Generator().manual_seed(width)) / 200

    def grid(self, size: int) -> tuple[int, int]:
        return 4, 4

    def flops(self, size: int) -> float:
        return 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, 16, 16) → (n, 4, 4, width)."""
        patches = images.float().view(-1, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 4, 48)
        return (64 * (patches @ self.matrix)).round() / 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor, list[Tensor]]:
    """A folder of random moments with features of two encoders, and what is in it in float64."""
    generator = torch.Generator().manual_seed(1)
    moments = 4 * torch.randn(RECORDS, 8, 8, 8, generator=generator)
    moments[:, 4:] = moments[:, 4:].abs()
    labels = torch.randint(0, CLASSES, (RECORDS,), generator=generator)
    folder = tmp_path_factory.mktemp("truth") / "data"
    manifest = Manifest(0, (8, 8, 8), "float32", SCALE, VaeInfo("none"), "random", CLASSES)
    write_shards(folder, [(moments, labels)], manifest, shard_size=5)
    pixels = torch.randint(0, 256, (RECORDS, 3, 16, 16), generator=generator, dtype=torch.uint8)
    encoders, records = (Patches("one", 10), Patches("two", 6)), open_data(folder, verify=False)
    for encoder in encoders:
        write_features(folder, records, encoder, Pictures(pixels, records))
    records.close()
    return folder, moments.double(), labels, [encoder(pixels).flatten(1, 2).double() for encoder in encoders]


Snapshot = dict[str, dict[str, Tensor]]


def copied(trainer: StageTrainer) -> Snapshot:
    return {group: program.as_float64(tensors) for group, tensors in trainer.optimizer.state().items()}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """By stage: the state that it begins with, of weights that are general everywhere; then each step's results."""
    seen: dict[str, list[Any]] = {}
    resume, call, owner = StageTrainer.resume, Step.__call__, {}

    @torch.no_grad()
    def general_start(trainer: StageTrainer, clock: Any) -> int:
        first = resume(trainer, clock)
        generator = torch.Generator().manual_seed(len(seen))
        state = trainer.optimizer.state()
        for group in ("model", "heads"):
            for name, tensor in state.get(group, {}).items():
                if name != "pos_embed":
                    gain = 1.0 if name.endswith("_norm.weight") else 0.0
                    spread = 0.6 / math.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 0.2
                    tensor.copy_(gain + spread * torch.randn(tensor.shape, generator=generator))
        for name, tensor in state["ema"].items():
            tensor.copy_(state["model"][name])
        owner[id(trainer.step)] = trainer
        seen[trainer.stage.name] = [copied(trainer)]
        return first

    def recorded(step: Step, number: int, batches: Any) -> Any:
        losses, norm = call(step, number, batches)
        trainer = owner[id(step)]
        found = float(losses.denoise), float(losses.aux), float(norm)
        seen[trainer.stage.name].append((found, copied(trainer)))
        return losses, norm

    monkeypatch.setattr(StageTrainer, "resume", general_start)
    monkeypatch.setattr(Step, "__call__", recorded)
    return seen


def close(found: Tensor, true: Tensor, before: Tensor) -> bool:
    """Whether a tensor went the true way from where it began: to 2·10⁻⁵ of the way, and float32's rounding."""
    allowed = 2e-5 * (true - before).norm() + 2e-7 * true.norm() + 1e-9
    return bool((found - true).norm() < allowed)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_of_every_stage_equal_the_program(case, data, watched, tmp_path):
    torch.set_num_threads(1)
    wanted = CASES[case]
    folder, moments, labels, features = data
    text = RECIPE.format(
        data=folder, out=tmp_path / "out", seed=SEED, path=wanted.path, time=wanted.time, clip=wanted.clip,
        qk_norm=str(wanted.qk_norm).lower(), modulation=wanted.modulation, accumulation=wanted.accumulation,
        rows=wanted.rows,
        kernels="\n".join(f'{op} = "{wanted.kernels}"' for op in SWITCHES),
    )  # fmt: skip
    (tmp_path / "truth.toml").write_text(text + wanted.stages)
    run(load(tmp_path / "truth.toml"))
    setting = Setting(
        depth=3, heads=3, patch=2, channels=4, classes=CLASSES, dropout=0.3, qk_norm=wanted.qk_norm, path=wanted.path,
        batch=BATCH, scale=SCALE, lr=3e-3, warmup=2, betas=(0.8, 0.9), eps=1e-3, decay=0.7, clip=wanted.clip, ema=0.6,
    )  # fmt: skip
    draws, teacher = Numbers(wanted.time, wanted.path), {}
    clipped = set()
    for method, (name, (start, *steps)) in zip(wanted.methods, watched.items(), strict=True):
        place = start["model"].pop("pos_embed")
        start["ema"].pop("pos_embed")
        assert torch.allclose(place[0], program.positions(48, 4), atol=1e-7, rtol=0)
        state = State(dict(start["model"]), dict(start.get("heads", {})), dict(start["ema"]))
        assert len(steps) == STEPS
        for number, (found, after) in enumerate(steps):
            true = program.train(setting, method, state, teacher, draws, moments, labels, features, number)
            clipped.add(wanted.clip > 0 and true[2] > wanted.clip)
            assert found == pytest.approx(true, rel=5e-6, abs=1e-7), (name, number)
            groups = {"model": state.model, "heads": state.heads, "ema": state.ema}
            for group, weights in groups.items():
                for key, value in weights.items():
                    assert close(after[group][key], value, start[group][key]), (name, number, group, key)
            for kind, tensors in (("exp_avg", state.first), ("exp_avg_sq", state.second)):
                for key, value in tensors.items():
                    part, parameter = key.split(".", 1)
                    ours, nothing = after["optim"][f"{part}.{kind}.{parameter}"], torch.zeros_like(value)
                    assert close(ours, value, nothing), (name, number, kind, key)
            assert float(after["optim"]["model.step"]) == number + 1
        teacher = dict(state.model if wanted.teacher_group == "model" else state.ema)
    assert True in clipped or not wanted.clip
    assert False in clipped or wanted.clip != 1.4


KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Counter, key and words as Random123 publishes them for Philox4x32-10."""


@pytest.mark.parametrize(("counter", "key", "found"), KNOWN)
def test_the_programs_generator_gives_the_published_words(counter, key, found):
    assert program.philox(counter, key) == found


def test_every_draw_equals_the_programs():
    numbers = torch.tensor([0, 1, 12, 2**32 - 1, 2**32, 2**40 + 3])
    for seed in (0, 1, SEED, 2**63 + 11):
        for purpose in random.Purpose:
            chances = random.uniform(seed, purpose, numbers, 6)
            ours = random.normal(seed, purpose, numbers, (3, 5))
            for row, number in enumerate(numbers.tolist()):
                words = program.words(seed, purpose, number, 6)
                exact = torch.tensor([((word >> 8) + 0.5) / 2**24 for word in words])
                assert torch.allclose(chances[row], exact, rtol=1e-7, atol=0)
                assert torch.allclose(ours[row].double(), program.normals(seed, purpose, number, (3, 5)), atol=2e-6)
        for number in (0, 1, 7):
            assert np.array_equal(random.epoch_order(seed, number, 29), program.permutation(seed, 7, number, 29))
            for group in (0, 1, 2):
                strata = program.permutation(seed, 6, number, 29, group)
                assert np.array_equal(random.strata(seed, number, 29, group), strata)
