"""Self-Transcendence in a loop of somebody else's: loss and gradients are the trainer's, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import st_fast
from st_fast import SelfTranscendence, UserError
from st_fast.model import DiffusionTransformer, flow
from st_fast.recipe import RecipeError
from tests.train.own_module import Net
from tests.train.schedule import loop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return loop.with_teacher(tmp_path_factory.mktemp("standalone"))


def settings_of(stage: Any) -> dict[str, Any]:
    names = ("student_depth", "teacher_depth", "cfg_scale", "loss", "weight", "hidden", "t_range", "mask")
    return {name: getattr(stage.method, name) for name in names}


@pytest.mark.parametrize("mask", ["sample", "sample_mean", "released"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_loss_and_gradients_are_the_trainers_to_the_bit(folder, mask, loss) -> None:
    options = (
        f"--stage.transcend.mask={mask}",
        f"--stage.transcend.loss={loss}",
        "--stage.transcend.t_range=[0.1,0.8]",
    )
    trained = loop.Loop(folder, "transcend", options)
    trainer = trained.trainer
    ((batch,),) = trained.iterator.steps(0, 1)
    assert 0 < len(batch.rows.index) < len(batch.t) or mask == "released"
    losses = trainer.step.forward(0, batch)
    losses.backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    heads = {name: p.grad.clone() for name, p in trainer.method.heads.named_parameters()}
    trainer.model.zero_grad(set_to_none=True)

    # The loop of somebody else, who has the student, the teacher's folder and the batch as tensors.
    supervise = SelfTranscendence(folder / "out" / "align", **settings_of(trained.stage))
    supervise.head.load_state_dict(trainer.method.heads.state_dict())
    velocity, hidden = trainer.model(batch.x_t, batch.t, batch.student_condition, supervise.student_depth)
    aux = supervise(hidden, batch.x_t, batch.t, batch.condition)
    denoise = flow.denoising_loss(velocity, batch.noise - batch.x).sum() / len(batch.t)
    (denoise + aux).backward()
    assert torch.equal(aux, losses.aux) and torch.equal(denoise, losses.denoise) and aux.item() != 0
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(p.grad, heads[name]) for name, p in supervise.head.named_parameters())


def test_only_the_projection_is_trained_and_saved_and_the_teacher_moves_along(folder) -> None:
    supervise = SelfTranscendence(folder / "out" / "align", 1, 2, hidden=24)
    names = [name for name, _ in supervise.named_parameters()]
    assert names == list(supervise.state_dict()) and all(name.startswith("head.projectors.") for name in names)
    teacher = supervise._method.teacher
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    supervise.to(torch.float64).train()
    assert next(teacher.parameters()).dtype == torch.float64 and not teacher.training


class Plain(nn.Module):
    """A loop's own arithmetic, in float64: the loss of a teacher that is somebody's own module."""

    def __init__(self, teacher: Net, head: nn.Module) -> None:
        super().__init__()
        self.teacher, self.head = teacher, head

    def features(self, x: Tensor, t: Tensor, y: Tensor, last: int) -> Tensor:
        net = self.teacher
        h = net.patches(x).flatten(2).transpose(1, 2) + (net.label(y) + net.time(t[:, None]))[:, None] * net.scale
        for block in net.blocks[:last]:
            h = block(h)
        return h

    def forward(self, hidden: Tensor, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        conditional, null = self.features(x, t, y, 3), self.features(x, t, torch.full_like(y, 5), 3)
        f = null + 4.0 * (conditional - null)
        losses = (self.head(hidden) - f).square().mean((1, 2))
        inside = ((t >= 0.4) & (t <= 0.7)).double()
        return 0.5 * (inside * losses).mean()


@pytest.mark.parametrize("as_image", [False, True])
def test_a_teacher_may_be_somebodys_own_module(as_image) -> None:
    teacher, student = Net(dropout=0.0), Net(dropout=0.0)
    supervise = SelfTranscendence(
        st_fast.tap(teacher, "blocks"), 2, 3, cfg_scale=4.0, hidden=24, null_label=5, width=24, teacher_width=16
    )
    x, t, y = torch.randn(6, 3, 4, 4), torch.linspace(0.3, 0.8, 6), torch.arange(6) % 5
    hidden = torch.randn(6, 4, 24, requires_grad=True)
    given = hidden.transpose(1, 2).unflatten(2, (2, 2)) if as_image else hidden
    loss = supervise(given, x, t, y)
    (gradient,) = torch.autograd.grad(loss, hidden)
    plain = Plain(teacher, supervise.head).double()
    truth = plain(hidden.double(), x.double(), t.double(), y)
    (expected,) = torch.autograd.grad(truth, hidden)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert gradient[0].abs().max() == 0 and gradient[2].abs().max() > 0  # t = 0.3 lies outside, 0.5 inside
    del student


def test_a_batch_without_a_sample_in_the_range_adds_nothing(folder) -> None:
    supervise = SelfTranscendence(folder / "out" / "align", 1, 2, hidden=24, t_range=(0.4, 0.5))
    config = supervise._method.teacher.config
    hidden = torch.randn(3, config.tokens, config.width, requires_grad=True)
    loss = supervise(
        hidden, torch.randn(3, *config.latent_shape), torch.full((3,), 0.9), torch.zeros(3, dtype=torch.int64)
    )
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0


def test_what_does_not_fit_is_told_in_one_line(folder) -> None:
    where = folder / "out" / "align"
    teacher: DiffusionTransformer = SelfTranscendence(where, 1, 2)._method.teacher
    for make, told in (
        (lambda: SelfTranscendence(where, 1, 99), "teacher_depth = 99: the teacher has"),
        (lambda: SelfTranscendence(folder / "nothing", 1, 2), "nothing: there is nothing"),
        (lambda: SelfTranscendence(Net(), 1, 2), "teacher = Net: a module that is not st_fast's: null_label"),
        (lambda: SelfTranscendence(teacher, 1, 2, cfg_scale=-1.0), "cfg_scale"),
        (lambda: SelfTranscendence(teacher, 1, 2, mask="all"), "mask"),
        (lambda: SelfTranscendence(teacher, 1, 2, t_range=(0.7, 0.4)), "t_range"),
    ):
        with pytest.raises((UserError, RecipeError), match=told) as error:
            make()
        assert "\n" not in str(error.value)
    supervise, config = SelfTranscendence(teacher, 1, 2, hidden=24), teacher.config
    x, t, y = torch.randn(2, *config.latent_shape), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="hidden has 5 tokens, the teacher's block"):
        supervise(torch.randn(2, 5, config.width), x, t, y)
    with pytest.raises(UserError, match=r"hidden has 5 channels"):
        supervise(torch.randn(2, config.tokens, 5), x, t, y)
