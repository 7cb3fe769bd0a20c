"""Every schedule of the teacher trains the same: bit for bit where the same products are made, else to rounding."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.signals import StopRequest
from st_fast.recipe import RecipeError, load
from st_fast.train import trainer
from st_fast.train.batches import Lookahead
from st_fast.train.parallel import hand_out
from st_fast.train.run import run
from tests import tiny
from tests.train.schedule.loop import Loop

AUTO = "--run.streams=auto"
BEFORE: tuple[str, ...] = ()
SAME_BITS = {
    "beside": ("--run.teacher_placement=beside",),
    "ahead": ("--run.teacher_placement=ahead",),
    "prefetch": ("--run.prefetch=true",),
    "ahead, prefetch": ("--run.teacher_placement=ahead", "--run.prefetch=true"),
}
SAME_NUMBERS = {
    "sequential": ("--run.teacher_branches=sequential",),
    "two streams, ahead": ("--run.teacher_branches=streams", "--run.teacher_placement=ahead"),
    "padded": ("--run.supervised_rows=padded",),
    "padded, stratified": ("--run.supervised_rows=padded", "--flow.time=stratified"),
    "padded, all": (
        "--run.supervised_rows=padded", "--run.teacher_branches=streams", "--run.teacher_placement=ahead",
        "--run.prefetch=true",
    ),
}  # fmt: skip
SHAPES = {
    "one batch": (), "accumulation": ("--optim.accumulation=2",), "ends midway": ("--stage.transcend.stop_step=5",),
    "released mask": ("--stage.transcend.mask=released",),
}  # fmt: skip
"""What a schedule must hold for."""
ROUNDING = 2e-4
"""Relative, of losses and norms over ten steps of Adam in float32, when products are split in another way."""


def values(numbers: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """(steps, 3)."""
    return torch.stack([torch.stack(one) for one in numbers]).cpu()


@cache
def plainly(folder: Path, options: tuple[str, ...]) -> tuple[list[tuple[torch.Tensor, ...]], dict[str, torch.Tensor]]:
    """Numbers and end of the plain schedule."""
    return Loop(folder, "transcend", options).run()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", SAME_BITS)
def test_when_a_target_is_made_changes_no_bit(schedule, shape, folder):
    numbers, state = Loop(folder, "transcend", (*SHAPES[shape], AUTO, *SAME_BITS[schedule])).run()
    expected, end = plainly(folder, SHAPES[shape])
    assert len(numbers) == 10 and any(float(aux) > 0 for _, aux, _ in numbers)
    assert torch.equal(values(numbers), values(expected))
    assert state.keys() == end.keys() and all(torch.equal(state[key], end[key]) for key in state)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", SAME_NUMBERS)
def test_how_the_teachers_rows_are_split_changes_rounding_only(schedule, shape, folder):
    time = tuple(option for option in SAME_NUMBERS[schedule] if "time" in option)
    numbers, _ = Loop(folder, "transcend", (*SHAPES[shape], AUTO, *SAME_NUMBERS[schedule])).run()
    expected, _ = plainly(folder, (*SHAPES[shape], *time))
    assert any(float(aux) > 0 for _, aux, _ in numbers)
    torch.testing.assert_close(values(numbers), values(expected), rtol=ROUNDING, atol=1e-7)


def test_ahead_makes_every_target_once_and_before_the_update_of_the_step_before(folder):
    loop = Loop(folder, "transcend", (AUTO, "--run.teacher_placement=ahead", "--stage.transcend.stop_step=6"))
    step, order = loop.trainer.step, []
    target, update = step.supervision.target, step.optimizer.update
    step.supervision.target = lambda batch: order.append(int(batch.ordinals[0]) // 8) or target(batch)
    step.optimizer.update = lambda: order.append("update") or update()
    list(loop.steps())
    assert order == [0, 1, "update", 2, "update", 3, "update", 4, "update", 5, *["update"] * 6]


def test_a_target_made_ahead_is_of_the_very_batch_that_comes_and_of_no_other(folder):
    loop = Loop(folder, "transcend", (AUTO, "--run.teacher_placement=ahead"))
    first, second, third = (batches for batches, _ in zip(loop.iterator.steps(0, 10), range(3), strict=False))
    targets = loop.trainer.step.targets
    made: list[int] = []
    targets._supervision.target = lambda batch: made.append(int(batch.ordinals[0])) or ()
    targets.start_ahead(1, second[0])
    targets.start(2, third[0])
    targets.start(1, second[0])  # the one made ahead was for the call that came
    targets.start_ahead(1, first[0])
    targets.start(1, first[0])
    assert made == [int(batches[0].ordinals[0]) for batches in (second, third, second, first)]


@pytest.mark.parametrize("ahead", [SAME_BITS["ahead, prefetch"]], ids=["ahead"])
def test_interrupting_a_run_that_looks_ahead_at_every_step_is_bit_exact(ahead, tmp_path, monkeypatch):
    data, stop = tiny.write_data(tmp_path / "latents"), StopRequest()
    options = (AUTO, *ahead, "--stage.align.steps=2", "--stage.transcend.steps=4", "--run.save_every=100")
    whole = load(tiny.write_recipe(tmp_path / "whole.toml", data, tmp_path / "whole"), options)
    run(whole)
    recipe = load(tiny.write_recipe(tmp_path / "cut.toml", data, tmp_path / "cut"), options)
    call, stops = trainer.Step.__call__, 0

    def stopping(self, *arguments):
        stop.name = "SIGTERM"
        return call(self, *arguments)

    from contextlib import nullcontext

    monkeypatch.setattr("st_fast.train.run.stop_on_signals", lambda: nullcontext(stop))
    monkeypatch.setattr(trainer.Step, "__call__", stopping)
    while True:
        stop.name = None
        try:
            run(recipe)
            break
        except Interrupted:
            stops += 1
    assert stops == 6
    for name in ("align", "transcend"):
        ours, theirs = (
            checkpoint.latest(tmp_path / out / name / "checkpoints", print).groups for out in ("cut", "whole")
        )
        assert all(torch.equal(ours[g][k], theirs[g][k]) for g in theirs for k in theirs[g])


def test_a_rollback_with_a_target_made_ahead_goes_on_as_without(folder):
    def run_with(*options: str) -> torch.Tensor:
        loop, kept, trained = Loop(folder, "transcend", options), {}, []
        for number, scalars in enumerate(loop.steps(), start=1):
            trained.append(scalars)
            if number == 2:
                kept = {g: {k: t.clone() for k, t in ts.items()} for g, ts in loop.trainer.optimizer.state().items()}
            if number == 5:  # back to earlier weights, on with the stream: what `StageTrainer.roll_back` does
                hand_out(loop.trainer.optimizer.state(), kept, loop.trainer.context.ranks)
                loop.trainer.optimizer.follow()
        return values(trained)

    assert torch.equal(run_with(AUTO, "--run.teacher_placement=ahead"), run_with())


def test_lookahead_gives_every_item_once_and_in_order_however_often_it_is_peeked():
    made = []
    items = Lookahead(made.append(i) or i for i in range(4))
    assert next(items) == 0 and made == [0]
    assert items.peek() == 1 and items.peek() == 1 and made == [0, 1]
    assert list(items) == [1, 2, 3]
    assert items.peek() is None and list(items) == []


@pytest.mark.parametrize(
    ("option", "available"),
    [
        ("--run.teacher_branches=streams", '"batched" or "sequential"'),
        ("--run.teacher_placement=beside", "before"),
        ("--run.teacher_placement=ahead", "before"),
        ("--run.prefetch=true", "false"),
    ],
)
def test_streams_without_cuda_are_refused_in_a_line_that_says_what_is_available(option, available, folder):
    with pytest.raises(RecipeError) as refusal:
        load(folder / "tiny.toml", [option])
    text = str(refusal.value)
    assert option.split("=")[0].removeprefix("--") in text and "CUDA" in text and "on cpu" in text
    assert available in text and 'run.streams = "auto"' in text and "\n" not in text
    assert load(folder / "tiny.toml", [option, AUTO]).run.streams == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_found_at_the_start_is_refused_as_one_that_was_named(folder, tmp_path):
    options = ["--run.device=auto", f"--run.out={tmp_path / 'out'}", "--run.cuda_graphs=true"]
    recipe = load(folder / "tiny.toml", [*options, "--run.supervised_rows=padded"])
    with pytest.raises(UserError, match=r"run\.cuda_graphs = true: the run is on cpu.*allowed: \"auto\" or false"):
        run(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--run.supervised_rows=exact",), "run.supervised_rows"),
        (("--run.teacher_placement=beside",), "run.teacher_placement"),
        (("--run.teacher_branches=streams",), "run.teacher_branches"),
        (("--optim.accumulation=2",), "optim.accumulation"),
        (("--run.checkpointing=attention",), "run.checkpointing"),
    ],
)
def test_graphs_name_what_they_need(options, key, folder):
    with pytest.raises(RecipeError, match=rf"{key} = .*run\.cuda_graphs = true needs it"):
        load(folder / "tiny.toml", ["--run.device=cuda", "--run.cuda_graphs=true", *options])


@pytest.mark.parametrize(
    "options", [("--run.checkpointing=block",), ("--run.checkpointing=attention", "--run.compile=off")]
)
def test_graphs_go_with_what_is_computed_again_outside_of_compiled_code(options, folder):
    graphs = ("--run.device=cuda", "--run.cuda_graphs=true", "--run.supervised_rows=padded")
    assert load(folder / "tiny.toml", [*graphs, *options]).run.cuda_graphs


def test_no_teacher_that_trains_is_asked_a_step_ahead(folder, tmp_path):
    text = (folder / "tiny.toml").read_text()
    text = text[: text.index("[[stage]]")] + '[[stage]]\nname = "own"\nsupervision = "sra"\nsteps = 3\n'
    (tmp_path / "sra.toml").write_text(text + "student_depth = 1\nteacher_depth = 2\n")
    with pytest.raises(RecipeError, match=r"run\.teacher_placement.*stage\.own \(sra\).*before or beside"):
        load(tmp_path / "sra.toml", [AUTO, "--run.teacher_placement=ahead"])
    load(tmp_path / "sra.toml", [AUTO, "--run.teacher_placement=beside"])
    with pytest.raises(RecipeError, match=r"run\.teacher_placement.*stage\.own.*shards.*before in a sharded run"):
        load(tmp_path / "sra.toml", [AUTO, "--run.teacher_placement=beside", "--run.sharding=fsdp2"])
