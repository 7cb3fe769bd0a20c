"""CUDA graphs: what a replay does, on graphs that record ops and run them again without Python (see fake_cuda)."""

from __future__ import annotations

import pytest
import torch

from st_fast.train.graphs import WARM_UP
from st_fast.train.step import Step
from tests.train.schedule import fake_cuda
from tests.train.schedule.loop import Loop
from tests.train.schedule.test_schedules import values

PADDED = ("--run.supervised_rows=padded", "--flow.time=stratified")

pytestmark = pytest.mark.usefixtures("one_thread")


def graphed(monkeypatch, folder, name: str, *options: str) -> tuple[torch.Tensor, list[fake_cuda.Graph], int]:
    """The numbers of a stage's steps, the graphs that were made, and how many passes Python made."""
    made, passes = [], []
    with monkeypatch.context() as patch:
        fake_cuda.install(patch.setattr)

        class Kept(fake_cuda.Graph):
            def __init__(self) -> None:
                super().__init__()
                made.append(self)

        learn = Step._learn
        patch.setattr(torch.cuda, "CUDAGraph", Kept)
        patch.setattr(Step, "_learn", lambda *args, **kwargs: passes.append(1) or learn(*args, **kwargs))
        patch.setattr("st_fast.recipe.check_run.check_device", lambda run, device: None)
        loop = Loop(folder, name, (*PADDED, "--run.cuda_graphs=true", *options))
        numbers, _ = loop.run()
    return values(numbers), made, len(passes)


@pytest.mark.parametrize("name", ["align", "transcend"])
def test_replays_train_as_python_does_on_every_batch(name, folder, monkeypatch):
    numbers, graphs, passes = graphed(monkeypatch, folder, name)
    expected, _ = Loop(folder, name, PADDED).run()
    assert torch.equal(numbers, values(expected))
    assert len(graphs) == 1 and graphs[0].replays == 10 - WARM_UP and passes == WARM_UP + 1


def test_a_pass_of_another_kind_or_shape_has_a_graph_of_its_own_or_none(folder, monkeypatch):
    options = ("--stage.transcend.stop_step=5", "--flow.time=uniform")
    numbers, graphs, passes = graphed(monkeypatch, folder, "transcend", *options)
    expected, _ = Loop(folder, "transcend", ("--run.supervised_rows=padded", *options)).run()
    assert torch.equal(numbers, values(expected))
    assert sum(graph.replays for graph in graphs) + passes - len(graphs) == 10
    assert len(graphs) >= 1 and passes > WARM_UP + 1


def test_results_of_a_step_outlive_the_next_replay(folder, monkeypatch):
    with monkeypatch.context() as patch:
        fake_cuda.install(patch.setattr)
        patch.setattr("st_fast.recipe.check_run.check_device", lambda run, device: None)
        loop = Loop(folder, "transcend", (*PADDED, "--run.cuda_graphs=true"))
        seen = [(float(denoise), denoise) for denoise, _, _ in loop.steps()]
    assert all(then == float(now) for then, now in seen) and len({then for then, _ in seen}) == 10


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nwhen capturing"), MemoryError("no room")])
def test_a_pass_that_cannot_be_recorded_is_made_as_all_others_are(error, folder, monkeypatch):
    expected, _ = Loop(folder, "transcend", PADDED).run()
    with monkeypatch.context() as patch:
        fake_cuda.install(patch.setattr)
        patch.setattr("st_fast.recipe.check_run.check_device", lambda run, device: None)
        loop = Loop(folder, "transcend", (*PADDED, "--run.cuda_graphs=true"))
        losses = loop.trainer.step.losses

        def fail(*args: object) -> object:
            found = losses(*args)
            if isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), fake_cuda._Recording):
                (found.denoise + found.aux).backward()  # gradients of half a pass
                raise error
            return found

        patch.setattr(loop.trainer.step, "losses", fail)
        numbers, _ = loop.run()
    assert torch.equal(values(numbers), values(expected))
    (said,) = [text for text in loop.said if "CUDA graphs" in text]
    assert said == f"CUDA graphs: a step can't be recorded, going on without: {str(error).splitlines()[0]}"
