"""`run.cuda_graphs = "auto"`: what a trial decides, and that it changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from st_fast.core.checkpoint.meta import GraphChoice, Meta
from st_fast.core.machine import PassTooLarge
from st_fast.core.ranks import Ranks
from st_fast.recipe import Recipe, load
from st_fast.recipe.schema import Stage
from st_fast.train import __main__ as train
from st_fast.train import choices, graphs, memory, stage
from st_fast.train.graphs import TIMED, WARM_UP, Losses, Trial, decide, settled, try_out
from tests.train.schedule.loop import Loop
from tests.train.schedule.test_schedules import values

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 2**30
CUDA = torch.device("cuda", 0)


class Team(Ranks):
    """The first of two ranks; the other one's times and refusal are added."""

    other: tuple[float, float] = (0.0, 0.0)
    refuses = False

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor(self.other)

    def any(self, flags: list[bool]) -> list[bool]:
        return [flag or self.refuses for flag in flags]


def stage_of(folder: Any, *options: str, name: str = "transcend") -> tuple[Recipe, Stage]:
    recipe = load(folder / "tiny.toml", ["--run.device=cuda", f"--run.out={folder / 'new'}", *options])
    return recipe, recipe.stage(name)


@pytest.mark.parametrize(("host", "device", "pays"), [(8.1, 10, True), (7.9, 10, False), (30, 10, True)])
def test_graphs_are_taken_where_the_host_is_the_bottleneck(host, device, pays, folder):
    said: list[str] = []
    choice = decide(Trial(host / 1e3, device / 1e3), stage_of(folder)[1], Ranks(0, 1, CUDA), said.append)
    assert choice == GraphChoice(pays, 1)
    times = f"to queue a pass takes the host {host:.1f} ms, to carry it out the device {device:.1f} ms"
    assert said == [f"transcend: CUDA graphs {'taken' if pays else 'left out'}: {times}"]


@pytest.mark.parametrize("pays", [True, False])
def test_what_a_trial_decides_is_what_the_trainer_does(pays, folder, monkeypatch):
    recipe, of = stage_of(folder)
    told: list[bool] = []
    trainer: Any = SimpleNamespace(
        context=SimpleNamespace(ranks=Ranks(0, 1, CUDA)), stage=of, step=SimpleNamespace(forward=print),
        optimizer=SimpleNamespace(parameters=list), use_graphs=lambda recipe: told.append(recipe.run.graphs),
    )  # fmt: skip
    monkeypatch.setattr(stage, "_batches", lambda *_: SimpleNamespace(steps=lambda first, last: [["batch"]]))
    monkeypatch.setattr(graphs, "try_out", lambda *_: Trial(1.0 if pays else 0.1, 1.0))
    tried = graphs.with_graphs(recipe, True)  # as the trainer was made
    decided, choice = stage.try_graphs(trainer, tried, (), 0, lambda text: None)
    assert decided.run.graphs == choice.used == pays and told == ([] if pays else [False])


def test_ranks_decide_together(folder):
    said: list[str] = []
    stage, team = stage_of(folder)[1], Team(0, 2, CUDA)
    object.__setattr__(team, "other", (0.001, 0.010))
    mine = Trial(0.010, 0.010)
    assert not decide(mine, stage, team, said.append).used, "11 ms of the hosts for 20 of the devices"
    object.__setattr__(team, "other", (0.009, 0.010))
    assert decide(mine, stage, team, said.append) == GraphChoice(True, 2)
    object.__setattr__(team, "refuses", True)
    assert not decide(mine, stage, team, said.append).used
    assert said[-1] == "transcend: CUDA graphs left out: another rank refuses"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--optim.accumulation=2", "optim.accumulation = 2"),
        ("--run.supervised_rows=exact", 'run.supervised_rows = "exact"'),
        ("--run.teacher_placement=beside", 'run.teacher_placement = "beside"'),
        ("--run.teacher_branches=streams", 'run.teacher_branches = "streams"'),
        ("--run.checkpointing=attention", 'run.checkpointing = "attention"'),
        ("--run.sharding=fsdp2", 'run.sharding = "fsdp2"'),
    ],
)
def test_what_excludes_graphs_is_said_and_needs_no_trial(option, reason, folder, capsys):
    said: list[str] = []
    recipe, stage = stage_of(folder, option)
    assert settled(recipe, stage, Ranks(0, 1, CUDA), said.append) == GraphChoice(False, 1)
    assert said == [f"transcend: CUDA graphs left out: {reason}"]
    train.main([str(folder / "tiny.toml"), option, "--run.device=cuda", "--dry-run"])
    assert f'# run.cuda_graphs = "auto": left out: {reason}\n' in capsys.readouterr().out


def test_a_key_that_is_set_decides_alone_and_a_cpu_says_nothing(folder):
    said: list[str] = []
    for used in (True, False):
        recipe, stage = stage_of(folder, f"--run.cuda_graphs={str(used).lower()}")
        assert settled(recipe, stage, Ranks(0, 1, CUDA), said.append) == GraphChoice(used, 1)
        assert recipe.run.padded == used
    recipe, stage = stage_of(folder)
    assert settled(recipe, stage, Ranks(0, 1, torch.device("cpu")), said.append) == GraphChoice(False, 1)
    assert settled(recipe, stage, Ranks(0, 1, CUDA), said.append) is None and not recipe.run.padded
    assert graphs.with_graphs(recipe, True).run.padded
    assert said == []


def test_a_choice_is_kept_for_as_many_ranks(folder, monkeypatch):
    said: list[str] = []
    recipe, stage = stage_of(folder)
    kept = GraphChoice(True, 2)
    monkeypatch.setattr(choices, "newest_meta", lambda recipe: Meta(cuda_graphs=kept))
    monkeypatch.setattr(Ranks, "broadcast_from_rank0", lambda ranks, say: say())
    assert settled(recipe, stage, Ranks(0, 2, CUDA), said.append) == kept
    assert settled(recipe, stage, Ranks(0, 1, CUDA), said.append) is None
    assert said == ["transcend: CUDA graphs taken, as before"]


class Watch:
    """A device whose passes each take 5 ms, and whose memory is what it is said to be."""

    kept, most, room = GIB, 2 * GIB, 4 * GIB

    def __init__(self, patch: Callable[..., None]) -> None:
        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                pass

            def elapsed_time(self, end: object) -> float:
                return 2.5

        for name, value in {
            "Event": Event, "synchronize": lambda device: None, "empty_cache": lambda: None,
            "memory_allocated": lambda device: self.kept, "max_memory_allocated": lambda device: self.most,
        }.items():  # fmt: skip
            patch(torch.cuda, name, value)
        patch(memory, "capacity", lambda device: self.room)


def test_a_trial_trains_nothing(folder, monkeypatch):
    expected, state = Loop(folder, "transcend", ("--run.supervised_rows=padded",)).run()
    loop = Loop(folder, "transcend", ("--run.supervised_rows=padded",))
    ((batch,),) = loop.iterator.steps(0, 1)
    parameters, passes = loop.trainer.optimizer.parameters(), []
    forward = partial(loop.trainer.step.forward, 0, batch)
    with monkeypatch.context() as patch:
        Watch(patch.setattr)
        trial = try_out(lambda: passes.append(1) or forward(), parameters, loop.iterator.ranks)
    assert len(passes) == WARM_UP + TIMED and trial.refusal == "" and trial.host > 0
    assert trial.device == pytest.approx(0.005)
    assert all(parameter.grad is None for parameter in parameters)
    numbers, after = loop.run()
    assert torch.equal(values(numbers), values(expected))
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)


def test_memory_for_a_graph_beside_an_ordinary_pass_must_be_there(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))

    def forward() -> Losses:
        return Losses(weight.sum(), weight.sum())

    watch = Watch(monkeypatch.setattr)
    watch.room = 3 * GIB
    assert try_out(forward, [weight], Ranks(0, 1, torch.device("cpu"))).refusal == ""
    watch.room -= 1
    trial = try_out(forward, [weight], Ranks(0, 1, torch.device("cpu")))
    assert trial.refusal == "a pass takes 1.00 GiB, twice that is more than the 2.00 GiB there are" and not trial.pays


def test_a_trial_that_runs_out_of_memory_leaves_graphs_out_and_no_gradient(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))

    def forward() -> Losses:
        weight.grad = torch.ones(3)
        raise torch.OutOfMemoryError("CUDA out of memory")

    Watch(monkeypatch.setattr)
    trial = try_out(forward, [weight], Ranks(0, 1, torch.device("cpu")))
    assert not trial.pays and "fits" in trial.refusal and weight.grad is None
    with pytest.raises(PassTooLarge):
        graphs._timed(forward, [weight], torch.device("cpu"))
