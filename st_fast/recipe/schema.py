"""The sections of a recipe: one frozen dataclass a component, with its defaults. Imports no torch.

The defaults are those of the published Self-Transcendence runs where these exist (arXiv 2601.07773).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from st_fast.recipe.limits import (
    BelowOne,
    Count,
    CountOrZero,
    FolderName,
    NamesOrNone,
    NonNegative,
    Positive,
    TimeRange,
)
from st_fast.recipe.methods import Method

SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
"""SiT's published sizes: (depth, width, heads)."""

Choice = Literal["auto", "fused", "reference"]


@dataclass(frozen=True)
class Model:
    """The network. `name` such as "SiT-XL/2" sets depth, width, heads and patch; or give these four.

    `attention` and `modulation` choose how the same is computed: the backend, and whether every block projects its
    own adaLN vectors or one matrix product makes all of them.
    """

    name: str = "custom"
    depth: CountOrZero = 0
    width: CountOrZero = 0
    heads: CountOrZero = 0
    patch: CountOrZero = 0
    channels: Count = 4
    latent_size: Count = 32
    num_classes: Count = 1000
    class_dropout: BelowOne = 0.1
    mlp_ratio: Positive = 4.0
    qk_norm: bool = True
    attention: str = "auto"
    modulation: Literal["per_block", "one"] = "per_block"


@dataclass(frozen=True)
class Flow:
    """The path from data (t = 0) to noise (t = 1), and how t is drawn."""

    path: Literal["linear", "cosine"] = "linear"
    time: Literal["uniform", "lognormal", "stratified"] = "uniform"


@dataclass(frozen=True)
class Data:
    """Where latents come from. `source = "digits"` makes the folder at `path` on first use.

    `images` is what the latents were made from, for encoders that run while training (a folder, zip, tar, …, as given
    to `st_fast.prepare`, and `images_subset` likewise); "" means images in the folder at `path` itself.
    """

    path: str = ""
    images: str = ""
    images_subset: str = ""
    source: Literal["shards", "digits"] = "shards"
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    verify: bool = True


@dataclass(frozen=True)
class Optim:
    """AdamW with clipping and a weight average. `batch_size` is global: over all ranks and accumulation steps.

    `micro_batch` gives the images of one forward pass on one rank instead of `accumulation` (0: that decides); "auto"
    takes the most that fit the device by the memory estimate.
    `grad_clip = 0` turns clipping off. `reduction` is the dtype in which ranks add gradients; "auto": the gradients'.
    `implementation` says who makes the step: this project's op in one pass ("auto"), PyTorch's fused AdamW, or apex's;
    the state is the same.
    """

    batch_size: Count = 256
    accumulation: Count = 1
    micro_batch: CountOrZero | Literal["auto"] = 0
    lr: Positive = 1e-4
    warmup_steps: CountOrZero = 0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0
    implementation: Literal["auto", "st_fast", "torch", "apex"] = "auto"
    reduction: Literal["auto", "fp32", "bf16"] = "auto"
    ema_decay: BelowOne = 0.9999


@dataclass(frozen=True)
class Run:
    """Where and how the run happens; nothing here changes the mathematics but `seed`, `precision` and `fp8`.

    A denoising loss above `spike_ratio` times its usual value (0: never looked at) rolls back to the last good
    checkpoint, at most `spike_retries` times a stage. A rank that gets no further for `hang_timeout` seconds ends the
    run (0: never). `checkpointing` computes activations again in the backward pass instead of keeping them: those of
    the attention, or of whole blocks. `fp8` casts the operands of the blocks' linear layers, with one scale a tensor.
    `sharding = "fsdp2"` keeps weights, moments and EMA in shards, one a rank; frozen teachers too with `shard_teacher`.

    `teacher_branches`, `teacher_placement`, `supervised_rows`, `prefetch` and `cuda_graphs` schedule the same work in
    another way: docs/schedules.md. Where one of them takes a second CUDA stream and there is none, `streams` says what
    happens: "required" is an error, "auto" does the work in the same order on the one queue there is, and "off" does
    so on CUDA, too.
    """

    out: str = ""
    seed: CountOrZero = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    fp8: Literal["off", "tensorwise"] = "off"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    checkpointing: Literal["none", "attention", "block"] = "none"
    teacher_branches: Literal["batched", "sequential", "streams"] = "batched"
    teacher_placement: Literal["before", "beside", "ahead"] = "before"
    supervised_rows: Literal["exact", "padded"] = "exact"
    prefetch: bool = False
    cuda_graphs: bool = False
    streams: Literal["required", "auto", "off"] = "required"
    sharding: Literal["none", "fsdp2"] = "none"
    shard_teacher: bool = False
    log_every: Count = 50
    save_every: Count = 5_000
    keep: Count = 2
    keep_every: CountOrZero = 0
    max_bad_steps: Count = 10
    spike_ratio: NonNegative = 0.0
    spike_retries: CountOrZero = 3
    hang_timeout: CountOrZero = 1_800
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


@dataclass(frozen=True)
class Sample:
    """How samples are drawn, in training (`every` steps; 0: only at a stage's end) and by `st_fast.sample`."""

    every: CountOrZero = 0
    num: CountOrZero = 80
    batch_size: Count = 100
    sampler: Literal["euler", "heun", "dopri5", "sde"] = "sde"
    steps: Count = 250
    cfg_scale: NonNegative = 1.9
    cfg_range: TimeRange = (0.0, 0.65)


@dataclass(frozen=True)
class Evaluate:
    """Which metrics are taken of `num` samples every `every` steps (0: only at a stage's end).

    `judge = "classifier"`: in the features of a classifier trained on the data's real images. `inception`, a file of
    the FID network's weights: FID and its like against `reference`, which is an ADM .npz, a folder of pictures or a
    data folder (empty: the run's own).
    """

    judge: Literal["none", "classifier"] = "none"
    every: CountOrZero = 0
    num: Count = 1_000
    inception: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Kernels:
    """Which implementation serves each op; "auto" takes what measured faster on this kind of device."""

    norm_modulate: Choice = "auto"
    gate_residual_norm_modulate: Choice = "auto"
    gate_residual: Choice = "auto"
    align: Choice = "auto"
    guided_feature_loss: Choice = "auto"
    cfg_extrapolate: Choice = "auto"
    qk_norm: Choice = "auto"
    linear: Choice = "auto"
    gelu_tanh: Choice = "auto"
    adamw_ema: Choice = "auto"


@dataclass(frozen=True)
class Profile:
    """Which steps of each stage are profiled: `steps` of them from step `start` on (0: none).

    "nsys" marks them for `nsys profile --capture-range=cudaProfilerApi`, "torch" writes a trace into the run folder and
    prints where the time went; "auto" is "nsys" where nsys started this process.
    """

    start: CountOrZero = 0
    steps: Count = 3
    tool: Literal["auto", "nsys", "torch"] = "auto"


@dataclass(frozen=True)
class Start:
    """Where a stage's weights come from when it begins: drawn, where `init` is empty, else read from a model."""

    init: str = ""
    """An earlier stage, or a path: a run, stage or checkpoint of ours, or another project's file."""
    init_weights: Literal["ema", "raw", "state"] = "ema"
    """Averaged or raw weights, of which a new average begins; "state": raw ones, their average and AdamW's moments."""
    init_heads: Literal["fresh", "match"] = "fresh"
    """Whether the method's heads are drawn, or are those of the file."""
    init_fresh: NamesOrNone = ()
    """Parts of the trunk that are drawn all the same, by how their keys begin, such as "y_embedder."."""


@dataclass(frozen=True)
class Stage:
    """One stage: its name, its supervision method with its own settings, how long it lasts, and what it starts from."""

    name: Annotated[str, FolderName()]
    method: Method
    steps: Count
    start: Start = Start()


@dataclass(frozen=True)
class Recipe:
    """The whole experiment. Stages run in order and refer to one another by name."""

    model: Model
    stages: tuple[Stage, ...]
    flow: Flow = field(default_factory=Flow)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    sample: Sample = field(default_factory=Sample)
    evaluate: Evaluate = field(default_factory=Evaluate)
    kernels: Kernels = field(default_factory=Kernels)
    profile: Profile = field(default_factory=Profile)

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError where there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"no stage named {name!r}; the recipe has {', '.join(s.name for s in self.stages)}")


SECTIONS: dict[str, type[Any]] = {key: kind for key, kind in get_type_hints(Recipe).items() if key != "stages"}
"""The recipe's tables other than its stages, by name, in the order they are written."""
