"""The sections of a recipe: one frozen dataclass a component, with its keys. Imports no torch.

The defaults are those of the published Self-Transcendence runs where these exist (arXiv 2601.07773).
"""

from dataclasses import dataclass, field, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from st_fast.core.options import BATCH_MOST, COUNT_MOST, SEED_MOST
from st_fast.kernels import FORMS, SWITCHES
from st_fast.recipe.architecture import Model as Model
from st_fast.recipe.error import show, wrong_value
from st_fast.recipe.keys import (
    FOLDER_NAME,
    BelowOne,
    Count,
    CountOrZero,
    Fraction,
    Guidance,
    Limit,
    NamesOrNone,
    NonNegative,
    PathText,
    Positive,
    Shift,
    TimeRange,
    between,
    fixed,
    free,
    keys,
    said,
)
from st_fast.recipe.measures import Evaluate as Evaluate
from st_fast.recipe.measures import Validate as Validate
from st_fast.recipe.methods import Method
from st_fast.recipe.routing import Routing

STEPS_MOST = 100_000
"""Of a solver."""
AVERAGES = Limit("with at most 4, none twice", lambda decays: len(decays) == len(set(decays)) <= 4)
SCHEDULE_MOST = 2**24
"""Updates of a schedule: the optimiser counts in float32, which is exact up to there."""


@dataclass(frozen=True)
class Flow:
    """The path from data (t = 0) to noise (t = 1), and how t is drawn."""

    path: Literal["linear", "cosine"] = fixed("linear", "How data and noise are mixed along t.")
    time: Literal["uniform", "lognormal", "stratified", "logit_normal"] = fixed(
        "uniform", "How t is drawn (lognormal: EDM's noise; stratified, also logit_normal: evenly within each batch)."
    )
    time_mean: float = fixed(0.0, "Mean of logit_normal's log(t / (1 − t)): above 0 more noise.")
    time_std: Annotated[float, between(0.01, 100)] = fixed(1.0, "Its standard deviation.")
    shift: Shift = fixed(
        1.0, "Times are shifted towards noise by s: t' = s·t / (1 + (s − 1)·t); 1: not; auto: s = √(C·H·W / 4096)."
    )

    def check(self) -> None:
        """RecipeError for parameters of a distribution that is not drawn from."""
        for key, usual in (("time_mean", 0.0), ("time_std", 1.0)):
            if (value := getattr(self, key)) != usual and self.time != "logit_normal":
                why = f"not read by flow.time = {show(self.time)}"
                raise wrong_value(f"flow.{key}", value, f'{usual:g}, or time = "logit_normal"', why)


@dataclass(frozen=True)
class Data:
    """Where latents come from. A resumed run checks by a digest that they are the same."""

    path: PathText = free("", "Folder of latents and labels, as `python -m st_fast.prepare` writes it.")
    images: PathText = free(
        "", 'The latents\' images, for live encoders: folder, zip, tar, …; "": the folder at `path`.'
    )
    images_subset: str = free("", "Which of these images, as given to `st_fast.prepare`.")
    text: str = free("", 'The encoder whose states of captions MMDiT reads; "": the only one that the data has.')
    source: Literal["shards", "digits", "emoji", "given"] = fixed(
        "shards", '"digits" and "emoji" make the folder at `path` on first use; "given": from Python.'
    )
    vae: str = free(
        "", 'The VAE that the latents must be of: its name or how its hash begins in their manifest; "": any.'
    )
    loader: Literal["auto", "resident", "dali", "torch"] = free("auto", "What reads the latents during training.")
    verify: bool = free(True, "Check the data's digests before training.")


@dataclass(frozen=True)
class Optim:
    """AdamW, or Muon for matrices (keys `muon_…`, docs/training.md), with clipping and a weight average (EMA).

    The global batch is what an update sees, however it is split."""

    batch_size: Annotated[int, between(1, 10_000_000)] = fixed(256, "Images of one update, over all ranks and passes.")
    accumulation: Annotated[int, between(1, 65_536)] = free(1, "Passes whose gradients add up to one update.")
    micro_batch: CountOrZero | Literal["auto"] = free(
        0,
        'Images of a pass on one rank; 0: `accumulation` decides; "auto": the most that fit.',
    )
    name: Literal["adamw", "muon"] = fixed(
        "adamw", "AdamW for all tensors, or Muon for the matrices of the blocks and AdamW for the rest."
    )
    lr: Positive = fixed(1e-4, "Learning rate.")
    warmup_steps: Annotated[int, between(0, 10_000_000)] = fixed(
        0, "Steps over which the learning rate rises linearly."
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = fixed(
        "constant",
        "The learning rate after the warm-up: constant, a decay to the stage's end, or (wsd) one of its last steps.",
    )
    decay_steps: Annotated[int, between(0, SCHEDULE_MOST)] = fixed(
        0, 'Steps of the decay, linear, at the stage\'s end, of "wsd"; the other schedules decay from the warm-up on.'
    )
    lr_end: Fraction = fixed(0.0, "Where a decay ends, as a share of `lr`.")
    betas: tuple[BelowOne, BelowOne] = fixed((0.9, 0.999), "Decay of AdamW's two running means.")
    eps: Positive = fixed(1e-8, "AdamW's ε.")
    weight_decay: NonNegative = fixed(0.0, "Decoupled weight decay.")
    grad_clip: NonNegative = fixed(1.0, "Largest norm of the gradient; 0: no clipping.")
    implementation: Literal["auto", "st_fast", "torch", "apex"] = free(
        "auto", "What makes the update: this project's op in one pass (auto), PyTorch's fused AdamW, or apex's."
    )
    reduction: Literal["auto", "fp32", "bf16"] = fixed(
        "auto", "The dtype in which ranks add gradients; auto: the gradients'."
    )
    ema_decay: BelowOne = fixed(0.9999, "Decay of the weight average a step.")
    ema_warmup: bool = fixed(
        False, "Begin with faster averages: after n updates the decay is at most (1 + n)/(10 + n)."
    )
    ema_decays: Annotated[tuple[BelowOne, ...], AVERAGES] = fixed(
        (), "Decays of further averages, kept in checkpoints beside the first: `--weights ema-0.999` draws from one."
    )
    muon_lr: Positive = fixed(1e-3, "Learning rate of Muon, with the warm-up and schedule of `lr`.")
    muon_adjust: Literal["original", "match_rms_adamw"] = fixed(
        "original", "Its factor for a matrix: √max(1, rows/columns), or 0.2·√max(rows, columns), for AdamW's rates."
    )
    muon_momentum: BelowOne = fixed(0.95, "Decay of its momentum, which is Nesterov's.")
    muon_weight_decay: NonNegative = fixed(0.0, "Its decoupled weight decay.")
    muon_split: bool = fixed(False, "Orthogonalise q, k and v apart, and so the parts of adaLN and of SwiGLU's w12.")
    muon_adaln: bool = fixed(False, "Update the blocks' adaLN projections by Muon, too.")
    muon_precision: Literal["auto", "fp32", "bf16"] = fixed(
        "auto", "Of the orthogonalisation's products; auto: bf16 on CUDA, else fp32."
    )

    def muon_updates(self, name: str) -> bool:
        """Whether Muon updates the trained 2-D weight of this name: all within the blocks but adaLN, and a fusion's."""
        inside = name.startswith(("blocks.", "joint_blocks.", "fusion_proj."))
        return self.name == "muon" and inside and ("adaLN_modulation" not in name or self.muon_adaln)

    def check(self, stage: "Stage") -> None:
        """RecipeError for a stage that its batches or its schedule don't fit; samples are numbered by 64-bit integers.

        A stage that starts with AdamW's state goes on with its count of updates, and may be past the warm-up.
        """
        for name, key in keys(Optim).items():
            if name.startswith("muon_") and getattr(self, name) != key.default and self.name != "muon":
                raise wrong_value(f"optim.{name}", getattr(self, name), 'left out, or optim.name = "muon"')
        if self.ema_decay in self.ema_decays:
            why = f"optim.ema_decay = {show(self.ema_decay)} is among them"
            raise wrong_value("optim.ema_decays", list(self.ema_decays), "the decays of further averages", why)
        where, schedule = f"stage.{stage.name}.steps", f"optim.schedule = {show(self.schedule)}"
        if stage.steps * self.batch_size >= 2**62:
            why = f"with optim.batch_size = {self.batch_size} more samples than 64-bit numbers count"
            raise wrong_value(where, stage.steps, f"at most {2**62 // self.batch_size}", why)
        if self.decay_steps and self.schedule != "wsd":
            raise wrong_value(
                "optim.decay_steps", self.decay_steps, '0, or schedule = "wsd"', f"not read by {schedule}"
            )
        if self.schedule == "constant":
            if self.lr_end:
                raise wrong_value(
                    "optim.lr_end", self.lr_end, "0, or a schedule that decays", f"not read by {schedule}"
                )
            return
        if self.schedule == "wsd" and not self.decay_steps:
            raise wrong_value("optim.decay_steps", 0, "the steps of the decay", schedule)
        warmup = 0 if stage.start.init and stage.start.init_weights == "state" else self.warmup_steps
        least = warmup + max(self.decay_steps, 1)
        if not least <= stage.steps <= SCHEDULE_MOST:
            why = f"{schedule} with {warmup} steps of warm-up and {self.decay_steps or 'at least 1'} of decay"
            raise wrong_value(where, stage.steps, f"{least} to {SCHEDULE_MOST}", why)


@dataclass(frozen=True)
class Run:
    """Where and how the run happens; of the keys only `seed`, `precision` and `fp8` change the mathematics.

    `teacher_branches`, `teacher_placement`, `supervised_rows`, `prefetch` and `cuda_graphs` schedule the same work in
    another way: docs/schedules.md.
    """

    out: PathText = free("", 'Folder of the run; "": runs/<name of the recipe>.')
    seed: Annotated[int, between(0, SEED_MOST)] = fixed(0, "Seed of every random draw.")
    precision: Literal["auto", "bf16", "fp32"] = fixed("auto", "Weights in use; auto: bf16 on CUDA, else fp32.")
    fp8: Literal["off", "tensorwise"] = fixed("off", "Multiply the blocks' linear layers in fp8, one scale a tensor.")
    device: Literal["auto", "cpu", "cuda"] = free("auto", "Where to train; auto: CUDA where there is a GPU.")
    compile: Literal["auto", "on", "off"] = free("auto", "Compile the blocks with torch.compile; auto: on CUDA.")
    checkpointing: Literal["none", "attention", "block"] = free(
        "none", "What the backward pass computes again instead of keeping it."
    )
    teacher_branches: Literal["batched", "sequential", "streams"] = free(
        "batched", "How a guided teacher runs with the labels and with the null label."
    )
    teacher_placement: Literal["before", "beside", "ahead"] = free(
        "before", "The teacher runs before the student's pass, beside it, or a step ahead."
    )
    supervised_rows: Literal["auto", "exact", "padded"] = free(
        "auto", "Supervised samples as many as there are, or padded; auto: padded with CUDA graphs."
    )
    prefetch: bool = free(False, "Copy the next batch to the device during the step.")
    cuda_graphs: bool | Literal["auto"] = free(
        "auto", "Replay each step as one CUDA graph; auto: where a trial finds that the host holds the GPU up."
    )
    streams: Literal["required", "auto", "off"] = free(
        "required",
        "Where a schedule's second CUDA stream is missing: an error; auto: one queue; off: always one queue.",
    )
    sharding: Literal["none", "fsdp2", "hsdp"] = free(
        "none", "Keep weights, optimiser state and EMA in shards: over all ranks, or (hsdp) within groups of them."
    )
    shard_ranks: Annotated[int, between(0, 65_536)] = free(0, "Ranks of a group that has all shards, of hsdp.")
    shard_teacher: bool = free(False, "Keep frozen teachers in shards as well.")
    log_every: Annotated[int, between(1, 1_000_000)] = free(50, "Steps from one log line to the next.")
    save_every: Count = free(5_000, "Steps from one checkpoint to the next.")
    keep: Annotated[int, between(1, 1_000_000)] = free(2, "Newest checkpoints that a stage keeps.")
    keep_every: CountOrZero = free(0, "Checkpoints at multiples of this are kept for good; 0: none.")
    max_bad_steps: Count = free(10, "Steps in a row without a finite loss that end the run.")
    spike_ratio: NonNegative = free(0.0, "A loss above this times its usual value rolls back a checkpoint; 0: never.")
    spike_retries: CountOrZero = free(3, "Rollbacks a stage at most.")
    hang_timeout: Annotated[int, between(0, 100_000_000)] = free(
        1_800, "Seconds without progress on a rank that end the run; 0: never."
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = free((), "Trackers that get the log, too.")

    @property
    def graphs(self) -> bool:
        """Whether steps are replayed as CUDA graphs; "auto" is no until a stage's trial has decided."""
        return self.cuda_graphs is True

    @property
    def padded(self) -> bool:
        """Whether supervised rows are padded."""
        return self.supervised_rows == "padded" or (self.supervised_rows == "auto" and self.graphs)

    def compiled(self, device: str) -> bool:
        """Whether blocks run compiled on "cpu" or "cuda"."""
        return self.compile == "on" or (self.compile == "auto" and device == "cuda")

    def shards(self, ranks: int) -> int:
        """Over how many of the ranks weights are split."""
        return {"none": 1, "fsdp2": ranks, "hsdp": min(self.shard_ranks, ranks)}[self.sharding]

    def bf16(self, device: str) -> bool:
        """Whether weights in use are bf16 on "cpu" or "cuda"; `run.device` "auto" counts as a GPU."""
        return self.precision == "bf16" or (self.precision == "auto" and device != "cpu")


@dataclass(frozen=True)
class Sample:
    """How samples are drawn, in training and by `st_fast.sample`."""

    every: CountOrZero = free(0, "Steps from one drawing to the next; 0: only at a stage's end.")
    num: Annotated[int, between(0, COUNT_MOST)] = free(80, "Samples of a drawing.")
    batch_size: Annotated[int, between(1, BATCH_MOST)] = free(100, "Samples drawn at a time.")
    sampler: Literal["euler", "heun", "dopri5", "sde"] = free("sde", "The solver.")
    steps: Annotated[int, between(1, STEPS_MOST)] = free(250, "Steps of the solver; dopri5 chooses its own.")
    shift: Shift = free(1.0, "Shift of the solver's times, as in [flow]; auto: by the size that is drawn.")
    cfg_scale: Guidance = free(1.9, "Classifier-free guidance; 1: none.")
    cfg_range: TimeRange = free((0.0, 0.65), "Times at which guidance acts.")
    contrast: Literal["unbiased", "released", "none"] = free(
        "unbiased",
        "Of a stage with `contrast`: take its bias out of v̂ at all times; only in `cfg_range`, as released; or never.",
    )
    guidance: Literal["cfg", "path_drop"] = free(
        "cfg",
        "What guidance leads away from: the null label, or with it the network without its inner blocks (SPRINT).",
    )
    internal_guidance: Guidance = free(1.0, "Internal Guidance, away from the internal head's output; 1: none.")
    internal_range: TimeRange = free((0.0, 1.0), "Times at which it acts.")
    prompts: tuple[str, ...] = free((), "What MMDiT draws while it trains; empty: captions of the data.")
    vae: PathText = free("", 'The VAE that decodes: a folder or a hub name; "": the one that the data names.')
    text_encoder: PathText = free("", "The folder where the data's text encoder lies; \"\": its name, or the hub's.")


CHOICES = ("auto", "fused", "reference")


if TYPE_CHECKING:

    class Kernels:
        """Which implementation serves each op; "auto" takes what measured faster on this kind of device."""

        def __getattr__(self, op: str) -> str: ...

else:
    Kernels = make_dataclass(
        "Kernels",
        [(op, Literal[*CHOICES, *FORMS.get(op, ())], free("auto", help)) for op, help in SWITCHES.items()],
        frozen=True,
    )
    Kernels.__doc__ = 'Which implementation serves each op; "auto" takes what measured faster on this kind of device.'


@dataclass(frozen=True)
class Profile:
    """Which steps of each stage are profiled."""

    start: CountOrZero = free(0, "First step that is profiled; 0: none.")
    steps: Annotated[int, between(1, 10_000)] = free(3, "How many steps; each takes memory.")
    tool: Literal["auto", "nsys", "torch"] = free(
        "auto", "Mark them for nsys, or write a trace with torch; auto: nsys where it started this process."
    )


@dataclass(frozen=True)
class Start:
    """Where a stage's weights come from when it begins: drawn, where `init` is empty, else read from a model."""

    init: PathText = fixed("", "An earlier stage, or a path: a run, stage or checkpoint, or another project's file.")
    init_weights: Literal["ema", "raw", "state"] = fixed(
        "ema", "Averaged or raw weights, of which a new average begins; state: raw, average and the optimiser's state."
    )
    init_heads: Literal["fresh", "match"] = fixed("fresh", "Draw the method's heads, or take those of the model.")
    init_fresh: NamesOrNone = fixed((), 'Parts that are drawn all the same, by how keys begin: ["y_embedder."].')


@dataclass(frozen=True)
class Contrast:
    """Terms of v̂'s loss beside any method's: contrastive flow matching (arXiv 2506.05350), by which v̂ is pushed from
    another sample's velocity, and the velocity's direction (arXiv 2501.01423)."""

    contrast: BelowOne = fixed(
        0.0, "λ of −λ·‖v̂ − ṽ‖², ṽ of another sample of the batch; 0: off, 0.05: published. From 1 on it is unbounded."
    )
    contrast_null: bool = fixed(True, "Samples whose condition was dropped take part, too.")
    direction: NonNegative = fixed(
        0.0, "λ of λ·mean(1 − cos(v̂, v)), over channels at each place; 0: off, 1: published with LightningDiT."
    )


@dataclass(frozen=True)
class Stage:
    """One stage: its name, its supervision method with its own settings, how long it lasts, what it starts from, and
    which tokens its network runs."""

    name: Annotated[str, FOLDER_NAME] = field(metadata=said("Name of the stage, of its folder and for other stages."))
    method: Method
    """The keys of the method that the key `supervision` names."""
    steps: Count = field(
        metadata=said("Updates; a resumed run may make a stage longer, if no schedule spans it.", free=True)
    )
    start: Start = Start()
    contrastive: Contrast = Contrast()
    routing: Routing = field(default_factory=Routing)


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
    validate: Validate = field(default_factory=Validate)
    kernels: Kernels = field(default_factory=Kernels)
    profile: Profile = field(default_factory=Profile)

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError where there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"no stage named {name!r}; the recipe has {', '.join(s.name for s in self.stages)}")

    def for_stage(self, stage: Stage) -> "Recipe":
        """The recipe with the network that this stage trains: [model], with what its method adds to it.

        What builds, costs, loads or samples a stage's network reads it from here; what is written down (the run's
        recipe.toml, a checkpoint's recipe) is the recipe as it was given. Of this recipe again: the same.
        """
        return replace(self, model=stage.routing.network(stage.method.network(self.model)))

    def teacher_model(self, teacher: str) -> Model:
        """The network of a teacher: of a stage of this recipe the one that it trains, of a path [model].

        Without an internal head: a teacher gives features.
        """
        stage = next((stage for stage in self.stages if stage.name == teacher), None)
        return replace(self.model if stage is None else self.for_stage(stage).model, internal_head=0)


SECTIONS: dict[str, type[Any]] = {key: kind for key, kind in get_type_hints(Recipe).items() if key != "stages"}
"""The recipe's tables other than its stages, by name, in the order they are written."""
