"""Who makes the optimiser's step does not matter: same trajectory, same state, same refusal of what is not finite."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks
from st_fast.recipe import load
from st_fast.recipe.schema import Optim
from st_fast.train import adamw
from st_fast.train.optim import Optimizer, learning_rate
from st_fast.train.parallel import hand_out
from st_fast.train.run import run
from tests import tiny

CPU = torch.device("cpu")
STEPS = 240
SETTINGS = Optim(lr=3e-3, warmup_steps=20, weight_decay=0.05, grad_clip=2.0, ema_decay=0.99)
TOLERANCE = 1e-5
"""Of masters, averages and moments after all steps, relative to each tensor's largest entry: 240 float32 roundings."""
NAMES = ("torch", "apex")


def adam_in_place(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], lr: Tensor, beta1: float, beta2: float, eps: float,
    step: Tensor, mode: int, bias_correction: int, weight_decay: float, inverse_scale: Tensor,
) -> None:  # fmt: skip
    """What apex's two capturable ops are documented to do, in float64; their argument list, checked."""
    assert (chunk, mode, bias_correction) == (65536, 1, 1)
    assert noop.dtype == torch.int32 and noop.shape == (1,) and step.dtype == torch.int32
    assert lr.dtype == inverse_scale.dtype == torch.float32
    if int(noop) == 1:
        return
    grads, weights, firsts, seconds = lists[:4]
    masters = lists[4] if len(lists) == 5 else weights
    for g, p, m, v, master in zip(grads, weights, firsts, seconds, masters, strict=True):
        assert g.dtype == p.dtype and m.dtype == v.dtype == master.dtype == torch.float32
        gradient = g.double() * float(inverse_scale)
        m.copy_(beta1 * m.double() + (1 - beta1) * gradient)
        v.copy_(beta2 * v.double() + (1 - beta2) * gradient**2)
        corrected = (v.double() / (1 - beta2 ** int(step))).sqrt() + eps
        change = m.double() / (1 - beta1 ** int(step)) / corrected + weight_decay * master.double()
        master.copy_(master.double() - float(lr) * change)
        if master is not p:
            p.copy_(master)


def _taking(count: int) -> Callable[..., None]:
    """The op that takes so many lists of tensors."""

    def op(*given: Any) -> None:
        assert len(given[2]) == count
        adam_in_place(*given)

    return op


@pytest.fixture
def apex(monkeypatch) -> Iterator[None]:
    """A stand-in for apex's compiled ops, allowed on the CPU."""
    library = types.ModuleType("amp_C")
    for name, lists in zip(
        ("multi_tensor_adam_capturable", "multi_tensor_adam_capturable_master"), (4, 5), strict=True
    ):
        setattr(library, name, _taking(lists))
    monkeypatch.setitem(sys.modules, "amp_C", library)
    double = adamw.Implementation(
        adamw.apex_update, adamw.torch_norm, lambda device: adamw.apex_refusal(torch.device("cuda"))
    )
    monkeypatch.setitem(adamw.IMPLEMENTATIONS, "apex", double)
    yield


def optimiser(name: str, dtype: torch.dtype, settings: Optim = SETTINGS) -> Optimizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 33), nn.LayerNorm(33), nn.Linear(33, 7))
    chosen = adamw.choose(name, CPU)
    return Optimizer(model, nn.Linear(7, 3), settings, dtype, chosen.update, chosen.norm)


def give_gradients(ours: Optimizer, step: int) -> None:
    """The same ones to all, clipped at some steps and not at others; step 50's hold an infinity."""
    generator = torch.Generator().manual_seed(step)
    for parameter in ours.parameters():
        scale = 0.3 if step % 3 else 0.01
        gradient = scale * (torch.randn(parameter.shape, generator=generator) + 0.5)
        parameter.grad = gradient.to(parameter.dtype)
    if step == 50:
        ours.parameters()[1].grad[3] = float("inf")


def train(ours: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(ours, step)
        norm = ours.update()
        assert bool(norm.isfinite()) == (step != 50)


def differences(ours: Optimizer, theirs: Optimizer) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest entry."""
    a, b = ours.state(), theirs.state()
    assert {g: list(t) for g, t in a.items()} == {g: list(t) for g, t in b.items()}
    return {
        f"{group}.{name}": float((tensor - b[group][name]).abs().max() / b[group][name].abs().max())
        for group, tensors in a.items()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_240_steps_of_every_implementation_are_the_same_trajectory(name, dtype, apex):
    ours, theirs = optimiser("st_fast", dtype), optimiser(name, dtype)
    train(ours, 0, STEPS)
    train(theirs, 0, STEPS)
    found = differences(theirs, ours)
    assert max(found.values()) <= TOLERANCE, max(found.items(), key=lambda item: item[1])
    assert float(theirs.state()["optim"]["model.step"]) == STEPS - 1  # one was not finite
    for copy, master in zip(theirs.model.copies, theirs.model.masters, strict=False):
        assert torch.equal(copy, master.to(dtype))


@pytest.mark.parametrize("name", ["st_fast", *NAMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warmup", [False, True])
def test_every_average_has_its_own_decay_and_a_warm_up_bounds_all(name, dtype, warmup, apex):
    settings = replace(SETTINGS, ema_decay=0.97, ema_decays=(0.5, 0.999), ema_warmup=warmup)
    ours = optimiser(name, dtype, settings)
    assert list(ours.state()) == ["model", "ema", "optim", "ema-0.5", "ema-0.999", "heads"]
    groups = {"ema": 0.97, "ema-0.5": 0.5, "ema-0.999": 0.999}
    expected = {group: {k: t.double().clone() for k, t in ours.state()["model"].items()} for group in groups}
    for step in range(40, 70):  # step 50's gradients are not finite
        done = float(ours.updates)
        train(ours, step, step + 1)
        for group, decay in groups.items():
            used = min(decay, (1 + done) / (10 + done)) if warmup else decay
            for key, old in expected[group].items():
                if step != 50:
                    old.lerp_(ours.state()["model"][key].double(), 1 - used)
    for group, tensors in expected.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(ours.state()[group][key].double(), tensor, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", ["st_fast", *NAMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_no_bit(name, dtype, apex):
    ours = optimiser(name, dtype)
    train(ours, 0, 3)
    before = {f"{g}.{n}": t.clone() for g, ts in ours.state().items() for n, t in ts.items()}
    give_gradients(ours, 50)
    ours.update()
    after = {f"{g}.{n}": t for g, ts in ours.state().items() for n, t in ts.items()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("names", [("st_fast", "torch"), ("torch", "apex"), ("apex", "st_fast")])
def test_a_state_saved_by_one_goes_on_with_another(names, apex):
    whole = optimiser("st_fast", torch.bfloat16)
    train(whole, 0, 200)
    first, second = (optimiser(name, torch.bfloat16) for name in names)
    train(first, 0, 100)
    hand_out(second.state(), first.state(), Ranks(0, 1, torch.device("cpu")))
    second.follow()
    train(second, 100, 200)
    assert max(differences(second, whole).values()) <= TOLERANCE


def test_the_clipping_factor_of_tiny_norms_is_clip_grad_norms():
    for norm, largest in ((3e-6, 2e-6), (4e-6, 0.5), (2.0, 0.5)):
        expected = min(1.0, largest / (norm + 1e-6))
        assert adamw.clip_factor(torch.tensor(norm), largest).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["st_fast", *NAMES])
def test_a_single_tensor_without_a_gradient_is_only_decayed_and_heads_have_no_average(name, apex):
    model, heads = nn.Linear(3, 4, bias=False), nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    chosen = adamw.choose(name, CPU)
    ours = Optimizer(model, heads, replace(SETTINGS, warmup_steps=1), torch.float32, chosen.update, chosen.norm)
    heads.weight.grad = torch.full_like(heads.weight, 0.5)
    assert [float(gradient.abs().max()) for gradient in ours.gradients()] == [0.0, 0.5]
    assert ours.update().item() == pytest.approx(0.5 * 6**0.5)
    torch.testing.assert_close(model.weight.detach(), before * (1 - 3e-3 * 0.05))
    assert ours.heads.emas == [] and len(ours.model.emas) == 1 and ours.updates == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_chosen_is_tried_once_with_lists_as_training_has_them(dtype, tmp_path, monkeypatch):
    tried: list[list[list[Tensor]]] = []

    def update(*given: Any, **numbers: float) -> None:
        tried.append([list(part) for part in given[:6]])
        if tried[-1][0][0].numel() == 0 or broken:
            raise RuntimeError("does not run here")

    monkeypatch.setitem(adamw.IMPLEMENTATIONS, "st_fast", adamw.Implementation(update, kernels.grad_norm))
    path, ranks = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out"), Ranks(0, 1, CPU)
    slow = (kernels.reference.adamw_ema_, kernels.reference.grad_norm)

    def found(*options: str) -> tuple[Any, Any]:
        return adamw.validated(load(path, options), ranks, dtype, said.append)

    said: list[str] = []
    broken = False
    assert found() == (update, kernels.grad_norm) and not said
    params, grads, _, _, _, copies = tried[0]
    assert [len(part) for part in tried[0]] == [1, 1, 1, 1, 1, dtype == torch.bfloat16]
    assert {one.dtype for one in (*grads, *copies)} == {dtype} and params[0].shape == (32,)
    written = [one.data_ptr() for place, part in enumerate(tried[0]) for one in part if place != 1]
    assert len(set(written)) == len(written)
    assert found("--kernels.adamw_ema=reference") == slow
    assert found("--optim.implementation=torch", "--kernels.adamw_ema=reference")[0] is adamw.torch_update
    broken = True
    assert found() == slow and len(said) == 1 and "adamw_ema" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_changed_the_masters_is_followed_and_no_state_has_a_graph(dtype):
    ours = optimiser("st_fast", dtype)
    ours.model.untrained["fixed"] = fixed = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    ours.model.frozen["fixed"] = torch.ones(3)
    train(ours, 0, 2)
    state = ours.state()
    assert list(state) == ["model", "ema", "optim", "heads"]
    assert {"weight", "bias"} == set(state["heads"]) and "fixed" in state["ema"]
    assert not any(tensor.requires_grad for tensors in state.values() for tensor in tensors.values())
    kept = [*ours.model.emas, *ours.model.frozen.values(), *(t for part in ours.model.state() for t in part)]
    assert not any(tensor.requires_grad for tensor in kept)
    for tensor in state["model"].values():
        tensor.add_(0.25)
    ours.follow()
    for parameter, name in zip(ours.model.parameters, ours.model.names, strict=True):
        assert torch.equal(parameter.detach(), state["model"][name].to(dtype))
    assert fixed.tolist() == [1.25] * 3
    alone = Optimizer(nn.Linear(2, 2), nn.Identity(), SETTINGS, dtype, kernels.adamw_ema_, kernels.grad_norm)
    assert list(alone.state()) == ["model", "ema", "optim"]


def test_clipping_can_be_off(apex):
    settings = Optim(lr=1e-2, grad_clip=0.0, ema_decay=0.9)
    runs = [optimiser(name, torch.float32, settings) for name in ("st_fast", *NAMES)]
    for one in runs:
        train(one, 0, 20)
    for other in runs[1:]:
        assert max(differences(other, runs[0]).values()) <= TOLERANCE


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (None, "amp_C can't be imported (ModuleNotFoundError)"),
        (types.ModuleType("amp_C"), "amp_C has no multi_tensor_adam_capturable and no"),
    ],
)
def test_apex_that_is_not_there_is_one_line_that_names_what_is(library, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", library)
    with pytest.raises(UserError) as refusal:
        adamw.choose("apex", torch.device("cuda"))
    text = str(refusal.value)
    assert text.startswith(f"optim.implementation = 'apex': {words}") and "\n" not in text
    assert "PyPI" in text and text.endswith("available here: st_fast, torch")


def test_apex_on_the_cpu_is_refused():
    expected = adamw.Implementation(adamw.apex_update, adamw.torch_norm, adamw.apex_refusal)
    assert adamw.IMPLEMENTATIONS["apex"] == expected
    with pytest.raises(UserError) as refusal:
        adamw.choose("apex", CPU)
    assert str(refusal.value) == "optim.implementation = 'apex': runs on cuda only; available here: st_fast, torch"


def test_a_run_goes_on_with_another_implementation_and_its_losses_are_those_of_one(tmp_path, one_thread):
    data = tiny.write_data(tmp_path / "data")
    losses = []
    for name, parts in {"one": [("st_fast", 6)], "two": [("torch", 3), ("st_fast", 6)]}.items():
        text = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / name).read_text()
        (tmp_path / "tiny.toml").write_text(text[: text.rindex("[[stage]]")])
        for implementation, steps in parts:
            options = [f"--optim.implementation={implementation}", f"--stage.align.steps={steps}"]
            run(load(tmp_path / "tiny.toml", options))
        losses.append([[r[k] for k in ("denoise", "aux")] for r in tiny.records(tmp_path / name, "train")])
    assert len(losses[0]) == len(losses[1]) == 6
    for one, two in zip(*losses, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the ops of torch and apex are run there")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_the_trajectory_is_the_same(name):
    device = torch.device("cuda")
    states = []
    for one in ("st_fast", name):
        try:
            chosen = adamw.choose(one, device)
        except UserError as refusal:
            pytest.skip(str(refusal))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 33), nn.Linear(33, 7)).to(device)
        ours = Optimizer(model, nn.Linear(7, 3).to(device), SETTINGS, torch.bfloat16, chosen.update, chosen.norm)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            for parameter in ours.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, parameter.dtype)
            ours.update()
        states.append({f"{g}.{n}": t for g, ts in ours.state().items() for n, t in ts.items()})
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
def test_each_update_has_the_bits_of_its_learning_rate_also_after_going_back(warmup):
    rates: list[Tensor] = []
    settings = Optim(lr=3.1e-4, warmup_steps=warmup)

    def update(*lists: object, **numbers: float) -> None:
        rates.append(lists[8].clone())  # type: ignore[attr-defined]
        lists[6].add_(len(rates) != 3)  # type: ignore[attr-defined]  # the third is skipped

    layer = torch.nn.Linear(3, 2)
    optimizer = Optimizer(layer, torch.nn.Identity(), settings, torch.float32, update, lambda grads: torch.ones(()))
    for number in range(14):
        if number == 12:  # to the start, as a rollback does
            optimizer.state()["optim"]["model.step"].zero_()
        optimizer.update()
    updates = [1, 2, 3, *range(3, 12), 1, 2]
    by_hand = torch.tensor([3.1e-4 * min(1.0, number / max(warmup, 1)) for number in updates], dtype=torch.float64)
    assert torch.allclose(torch.stack(rates).double(), by_hand, rtol=1e-7, atol=0)
    expected = [learning_rate(settings, torch.tensor(number)).float() for number in updates]
    assert torch.equal(torch.stack(rates), torch.stack(expected))
    assert len(set(torch.stack(rates).tolist())) == max(warmup, 1)


def torch_rates(settings: Optim, steps: int) -> list[float]:
    """The rates of `steps` updates by PyTorch's own schedulers, in turn."""
    schedulers = torch.optim.lr_scheduler
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=settings.lr)
    warmup, parts, ends = settings.warmup_steps, [], []
    if warmup:
        parts.append(schedulers.LinearLR(dummy, 1 / warmup, 1.0, warmup - 1) if warmup > 1 else constant(dummy))
        ends.append(warmup)
    length = settings.decay_steps or steps - warmup
    if settings.schedule == "wsd":
        parts.append(constant(dummy))
        ends.append(steps - length)
    if settings.schedule == "cosine":
        parts.append(schedulers.CosineAnnealingLR(dummy, length, settings.lr_end * settings.lr))
    else:
        parts.append(schedulers.LambdaLR(dummy, lambda n: 1 - (1 - settings.lr_end) * n / length))
    whole, rates = schedulers.SequentialLR(dummy, parts, ends), []
    for _ in range(steps):
        rates.append(dummy.param_groups[0]["lr"])
        dummy.step()
        whole.step()
    return rates


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize(("schedule", "decay"), [("linear", 0), ("cosine", 0), ("wsd", 7), ("wsd", 1), ("wsd", 17)])
def test_schedules_are_those_of_torch_and_end_with_the_stage(schedule, decay, warmup):
    settings = Optim(lr=3.1e-4, warmup_steps=warmup, schedule=schedule, decay_steps=decay, lr_end=0.15)
    found = learning_rate(settings, torch.arange(1, 24), steps=23)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(torch_rates(settings, 23), rel=1e-12)
    after = learning_rate(settings, torch.tensor([24, 90]), steps=23)
    assert after.tolist() == pytest.approx([0.15 * 3.1e-4] * 2, rel=1e-12)


@pytest.mark.parametrize(("warmup", "taken_over"), [(0, 0), (4, 0), (4, 2), (4, 30)])
@pytest.mark.parametrize(("schedule", "decay"), [("linear", 0), ("cosine", 0), ("wsd", 5)])
def test_a_schedule_goes_by_updates_made_and_by_the_stages_own(schedule, decay, warmup, taken_over):
    rates: list[Tensor] = []
    settings = Optim(lr=2e-3, warmup_steps=warmup, schedule=schedule, decay_steps=decay, lr_end=0.25)

    def update(*lists: object, **numbers: float) -> None:
        rates.append(lists[8].clone())  # type: ignore[attr-defined]
        lists[6].add_(len(rates) != 8)  # type: ignore[attr-defined]  # the eighth is skipped

    norm = torch.ones(())
    optimizer = Optimizer(nn.Linear(3, 2), nn.Identity(), settings, torch.float32, update, lambda grads: norm, 12)
    optimizer.begin(taken_over)
    optimizer.updates.fill_(taken_over)
    for _ in range(14):
        optimizer.update()
    counted = torch.tensor([*range(1, 9), *range(8, 13), 12]) + taken_over  # behind the end the last rate stays
    assert torch.equal(torch.stack(rates), optimizer.rate(counted).float())
    own = replace(
        settings, warmup_steps=max(warmup - taken_over, 0)
    )  # the decay's own time, after what warm-up is left
    expected = learning_rate(own, counted - taken_over, 12)
    left = own.warmup_steps
    assert torch.equal(torch.stack(rates)[left:], expected[left:].float())
    assert torch.stack(rates)[:left].tolist() == pytest.approx(
        [2e-3 * (taken_over + n) / max(warmup, 1) for n in range(1, left + 1)], rel=1e-6
    )
