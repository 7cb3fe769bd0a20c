"""Fused forwards in models of others: outputs and gradients stay, for every block that `patch` knows."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patched import CASES, B, D, H, Inputs, N, basic, close, draw, made, run, whole_dit, whole_flux, whole_pixart
from plain_dit import DiT, DiTBlock, FinalLayer, randomised
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard

from st_fast.kernels import for_diffusers, layers
from st_fast.kernels.patch import TARGETS, Patched, patch, unpatch


def test_every_class_known_is_tried() -> None:
    told = " ".join(says for _, _, says in CASES.values())
    assert all(f" {name}" in f" {told}" for name in TARGETS)


@pytest.mark.parametrize("name", CASES)
def test_a_patched_model_gives_what_it_gave_in_outputs_and_all_gradients(name: str) -> None:
    module, inputs, says = made(name)
    keys, theirs = list(module.state_dict()), run(module, inputs)
    assert str(patch(module)) == says
    close(run(module, inputs), theirs, 2e-5)
    assert list(module.state_dict()) == keys
    assert unpatch(module) == sum(int(word) for word in says.split() if word.isdigit()) and unpatch(module) == 0
    assert all(torch.equal(value, theirs[key]) for key, value in run(module, inputs).items() if value is not None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (whole_dit, "2 BasicTransformerBlock, 2 AdaLayerNormZero"),
        (whole_pixart, "2 BasicTransformerBlock"),
        (
            whole_flux,
            "1 FluxTransformerBlock, 2 AdaLayerNormZero, 2 FluxSingleTransformerBlock, 2 AdaLayerNormZeroSingle, "
            "1 AdaLayerNormContinuous",
        ),
    ],
)
def test_whole_models_of_diffusers_train_as_before_also_with_gradient_checkpointing(
    make: Callable[[], tuple[nn.Module, Inputs]], says: str
) -> None:
    model, inputs = make()
    model, inputs = randomised(model), inputs | {"return_dict": False}
    theirs = run(model, inputs)
    assert str(patch(model)) == says
    close(run(model, inputs), theirs, 2e-5)
    model.enable_gradient_checkpointing()
    close(run(model, inputs), theirs, 2e-5)


def lowered(module: nn.Module, inputs: Inputs) -> Inputs:
    """The module and its inputs with bfloat16 for float32, but for the number of a time step."""
    module.bfloat16()
    low: Inputs = {}
    for key, value in inputs.items():
        if value is torch.float32:
            low[key] = torch.bfloat16
        elif value.is_floating_point() and not (key == "timestep" and value.dim() == 1):
            low[key] = value.detach().bfloat16().requires_grad_(value.requires_grad)
        else:
            low[key] = value
    return low


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_it_is_no_farther_from_float32_than_before(name: str, precision: str) -> None:
    module, inputs, _ = made(name)
    exact = run(module, inputs)
    if precision == "bfloat16":
        inputs = lowered(module, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        before = run(module, inputs)
        assert patch(module).fused
        after = run(module, inputs)
    largest = max(float(value.abs().max()) for value in exact.values() if value is not None)
    for key, value in exact.items():
        if value is not None:
            assert after[key].dtype == before[key].dtype
            error = [float((values[key].float() - value).abs().max()) for values in (before, after)]
            assert error[1] <= 2 * error[0] + 2**-8 * largest, key


def test_flux_keeps_what_an_image_prompt_adds() -> None:
    """Its attention then has a third output."""
    module, inputs, _ = made("Flux")
    attention = module.attn.forward

    def three(**kwargs: Any) -> tuple[Tensor, ...]:
        outs = attention(**kwargs)
        return (*outs, outs[0].sin())

    module.attn.forward = three
    theirs = run(module, inputs)
    assert "FluxTransformerBlock" in patch(module).fused
    close(run(module, inputs), theirs, 2e-5)


@pytest.mark.parametrize("name", ["DiT", "DiT of diffusers", "PixArt", "Flux", "Flux single", "SD3"])
def test_a_patched_block_compiles_into_one_graph(name: str) -> None:
    module, inputs, _ = made(name)
    theirs = run(module, inputs)
    assert patch(module).fused
    torch._dynamo.reset()
    module.compile(fullgraph=True, backend="aot_eager")
    close(run(module, inputs), theirs, 2e-5)


@pytest.mark.parametrize("patched", [False, True])
def test_blocks_that_are_compiled_one_by_one_share_their_graphs(patched: bool) -> None:
    """Two, patched or not: the first block's input has no gradient."""
    model = randomised(DiT(depth=4))
    if patched:
        assert patch(model).fused
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    model(draw(B, N, D).detach(), draw(B, D).detach())
    assert counters["stats"]["unique_graphs"] == 2


def test_inductor_compiles_a_patched_block() -> None:
    module, inputs, _ = made("SiT")
    theirs = run(module, inputs)
    assert patch(module).fused
    torch._dynamo.reset()
    module.compile(fullgraph=True)
    close(run(module, inputs), theirs, 2e-5)


def test_a_copy_and_a_pickle_of_a_patched_model_are_patched_and_on_their_own() -> None:
    module, inputs, _ = made("DiT")
    patch(module)
    theirs = run(module, inputs)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        close(run(other, inputs), theirs, 1e-6)
        with torch.no_grad():
            module.blocks[0].mlp[0].weight.mul_(2)
        close(run(other, inputs), theirs, 1e-6)
        assert unpatch(other) == 3
        with torch.no_grad():
            module.blocks[0].mlp[0].weight.div_(2)


@pytest.mark.parametrize("name", ["DiT", "Flux"])
def test_fsdp2_shards_a_patched_model(name: str, one_rank: None) -> None:
    module, inputs, _ = made(name)
    theirs = run(module, inputs)
    assert patch(module).fused
    for block in getattr(module, "blocks", ()):
        fully_shard(block)
    fully_shard(module)
    close(run(module, inputs), theirs, 2e-5)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class MixedDiTBlock(layers.FusedDiTBlock, DiTBlock):
    pass


def test_a_forward_may_be_mixed_in_instead() -> None:
    """Also diffusers' block, whose own forward is still there for what isn't fused."""
    plain, mixed = randomised(DiTBlock(D, H)), randomised(MixedDiTBlock(D, H))
    inputs = CASES["SiT"][1]()
    close(run(mixed, inputs), run(plain, inputs), 2e-5)
    block, inputs, _ = made("DiT of diffusers")
    mixed = copy.deepcopy(block)
    mixed.__class__ = type("Mixed", (for_diffusers.FusedBasicTransformerBlock, type(block)), {})
    theirs = run(block, inputs)
    close(run(mixed, inputs), theirs, 2e-5)
    patch(block)
    for module in (mixed, block):
        calls: list[int] = []
        module.ff.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        module.set_chunk_feed_forward(1, 1)
        close(run(module, inputs), theirs, 2e-5)
        assert len(calls) == N


def test_hooks_do_not_see_the_inputs_of_the_trial_and_run_afterwards() -> None:
    block, inputs, _ = made("DiT of diffusers")
    calls: list[str] = []
    for name, part in block.named_modules():
        if not isinstance(part, nn.LayerNorm):
            part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    block.register_forward_hook(lambda module, args, out: 2 * out)
    hooked, ran = run(block, inputs), {*calls}
    calls.clear()
    assert patch(block).fused and not calls and block.training
    close(run(block, inputs), hooked, 2e-5)
    assert {"", "attn1", "ff"} <= {*calls} <= ran


@pytest.mark.parametrize("shape", [(B, N, D), (1, D), (1, 1, D)], ids=str)
def test_modulations_of_other_shapes_have_the_same_result(shape: tuple[int, ...]) -> None:
    """One row a token, as some video models have it, in plain PyTorch; one for all samples by the ops."""
    norm, x, a = nn.LayerNorm(D, elementwise_affine=False), draw(B, N, D), draw(B, N, D, seed=1)
    gate, shift, scale = (draw(*shape, seed=i) for i in (2, 3, 4))
    inputs = {"x": x, "a": a, "gate": gate, "shift": shift, "scale": scale}

    class Site(nn.Module):
        def forward(self, x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
            x_out, y = layers.gated_modulated(norm, x, a, gate, shift, scale)
            return x_out, y, layers.gated(x, a, gate), layers.modulated(norm, x, shift, scale)

    class Plain(nn.Module):
        def forward(self, x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
            x_out = x + gate * a if gate.dim() == 3 else x + gate.unsqueeze(1) * a
            shift, scale = (v if v.dim() == 3 else v.unsqueeze(1) for v in (shift, scale))
            return x_out, norm(x_out) * (1 + scale) + shift, x_out, norm(x) * (1 + scale) + shift

    close(run(Site(), inputs), run(Plain(), inputs), 1e-5)


def test_a_result_that_pytorch_would_promote_is_promoted() -> None:
    """A bfloat16 stream and a float32 gate: the sum is float32, from there on."""
    x, a, gate = draw(B, N, D).bfloat16(), draw(B, N, D).bfloat16(), draw(B, D)
    assert layers.gated(x, a, gate).dtype == torch.float32
    norm = nn.LayerNorm(D, elementwise_affine=False)
    x_out, y = layers.gated_modulated(norm, x, a, gate, gate, gate)
    assert x_out.dtype == y.dtype == torch.float32


class OtherForward(DiTBlock):
    """A block of the same parts that computes the same only while adaLN-Zero's weights are zero."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) + self.adaLN_modulation(c).unsqueeze(1)[..., -D:] * x


class OtherArguments(DiTBlock):
    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
        return super().forward(x, c) + rope


class DropPath(DiTBlock):
    """Alike in eval mode only."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + nn.functional.dropout(super().forward(x, c) - x, 0.5, self.training)


class Numbered(DiTBlock):
    """The second of its kind computes something else, which its repr doesn't show."""

    number = 0

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) * (1 + self.number)


def without_eps() -> nn.Module:
    block = DiTBlock(D, H)
    block.norm1 = nn.RMSNorm(D, elementwise_affine=False)
    return block


def hooked() -> nn.Module:
    block = DiTBlock(D, H)
    block.norm2.register_forward_hook(lambda module, args, out: 2 * out)
    return block


for _class in (OtherForward, OtherArguments, DropPath, Numbered):
    _class.__name__ = "DiTBlock"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: OtherForward(D, H), "its outputs differ by up to"),
        (lambda: OtherArguments(D, H), "its forward takes rope, too"),
        (lambda: DropPath(D, H), "its outputs differ by up to"),
        (hooked, "norm2 has a hook, which would no longer run"),
        (lambda: DiTBlock(D, H, affine=True), "norm1 is no LayerNorm or RMSNorm without weight and bias"),
        (without_eps, "norm1 is no LayerNorm or RMSNorm .* of a given eps"),
        (lambda: DiTBlock(D, H).to("meta"), "its weights are sharded or on the meta device"),
    ],
)
def test_a_block_that_computes_something_else_is_left_and_says_why(
    module: Callable[[], nn.Module], reason: str
) -> None:
    """Even where adaLN-Zero's weights are zeros still, which hide all that a block does."""
    model = module()
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            nn.init.zeros_(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told = patch(model)
    assert told.fused == {} and "forward" not in model.__dict__ and model.training
    assert re.search(f"nothing is fused; as before: 1 DiTBlock: {reason}", str(told)) and "\n" not in str(told)
    assert all(value.is_meta or torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_that_differ_in_a_number_of_theirs_are_tried_one_by_one() -> None:
    model = randomised(nn.ModuleList([Numbered(D, H), Numbered(D, H)]))
    model[1].number = 1
    told = patch(model)
    assert told.fused == {"DiTBlock": 1} and "forward" not in model[1].__dict__


def test_a_derivative_in_forward_mode_is_that_of_the_models_own_forward() -> None:
    block = DiTBlock(D, H)
    block.attn = nn.Linear(D, D)  # PyTorch's attention has no such derivative on the CPU
    randomised(block)
    x, c, direction = draw(B, N, D), draw(B, D), draw(B, N, D)
    _, truth = torch.func.jvp(lambda x: block(x, c), (x,), (direction,))
    assert patch(block).fused == {"DiTBlock": 1}
    _, found = torch.func.jvp(lambda x: block(x, c), (x,), (direction,))
    assert truth.abs().max() > 0
    torch.testing.assert_close(found, truth)


def test_a_modulation_a_token_runs_where_the_model_makes_one() -> None:
    block = randomised(DiTBlock(D, H))
    x, c = draw(B, N, D), draw(B, N, D)
    patch(block)
    shift, scale, gate, *mlp = block.adaLN_modulation(c).chunk(6, dim=-1)
    h = x + gate * block.attn(block.norm1(x) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, c), h + mlp[2] * block.mlp(block.norm2(h) * (1 + mlp[1]) + mlp[0]))


def test_meta_weights_may_be_patched_without_the_check_and_twice_is_once() -> None:
    model = DiT().to("meta")
    assert patch(model, check=False).fused == {"DiTBlock": 2, "FinalLayer": 1}
    assert patch(model, check=False) == Patched(
        left={"DiTBlock: its forward is already replaced": 2, "FinalLayer: its forward is already replaced": 1}
    )
    assert unpatch(model) == 3


def test_what_is_not_known_is_left_alone() -> None:
    class AdaLayerNormZero(FinalLayer):
        """The name of a class of diffusers, in another package."""

    assert patch(nn.Sequential(AdaLayerNormZero(D, 3), nn.LayerNorm(D))) == Patched()
    assert str(patch(basic("layer_norm"))) == "nothing is fused"


def test_the_check_changes_no_random_state() -> None:
    module, _, _ = made("DiT")
    before = torch.get_rng_state()
    patch(module)
    assert torch.equal(torch.get_rng_state(), before)
