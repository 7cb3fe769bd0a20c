"""What a step can't be faster than with the libraries' own pieces: its matrix products alone, its attention alone.

Every linear layer of the step is run at its own shape as the step runs it, forward and gradients (the teacher's forward
alone), and attention at its own shape through the backend that the model uses. Times are multiplied by how often each
occurs.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.timing import Effort, Stopwatch, Variant, interleave
from st_fast.model.attention import Attend, attend_packed
from st_fast.recipe import architecture
from st_fast.recipe.methods import SelfTranscendence, VelocityHead
from st_fast.recipe.schema import Model, Recipe, Stage

Linear = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Product:
    """y (rows, wide) = x (rows, deep)·wᵀ, and its two gradients if trained."""

    rows: int
    deep: int
    wide: int
    trained: bool

    @property
    def elements(self) -> int:
        """Read and written, operands and results."""
        return (self.rows * self.deep + self.deep * self.wide + self.rows * self.wide) * (3 if self.trained else 1)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.deep * self.wide * (3 if self.trained else 1)


@dataclass(frozen=True)
class Attended:
    """Self-attention of `batch` samples."""

    batch: int
    trained: bool


@dataclass(frozen=True)
class Floor:
    """Seconds of a step's matrix products and of its attention, each alone, and their FLOPs."""

    products: float
    attention: float
    product_flops: float
    attention_flops: float

    @property
    def seconds(self) -> float:
        return self.products + self.attention


def products(recipe: Recipe, stage: Stage, supervised: int) -> Counter[Product]:
    """All linear layers of one step, with `supervised` samples in the t-range."""
    model, batch = recipe.model, recipe.optim.batch_size
    found = _trunk(model, batch, model.depth, trained=True)
    n, d, patch = model.tokens, model.width, model.patch**2 * model.channels
    found[Product(batch * n, d, patch, True)] += 1
    found[Product(batch, d, 2 * d, True)] += 1
    method = stage.method
    if isinstance(method, VelocityHead | SelfTranscendence) and supervised:
        rows, hidden = supervised * n, method.hidden
        for deep, wide in ((d, hidden), (hidden, hidden), (hidden, d)):
            found[Product(rows, deep, wide, True)] += 1
        if isinstance(method, VelocityHead):
            found[Product(rows, d, patch, True)] += 1
        else:
            found += _trunk(model, 2 * supervised, method.teacher_depth, trained=False)
    return found


def _trunk(model: Model, batch: int, depth: int, trained: bool) -> Counter[Product]:
    n, d, hidden = model.tokens, model.width, int(model.width * model.mlp_ratio)
    found: Counter[Product] = Counter()
    for deep, wide in ((d, 3 * d), (d, d), (d, hidden), (hidden, d)):
        found[Product(batch * n, deep, wide, trained)] += depth
    found[Product(batch, d, 6 * d, trained)] += depth
    found[Product(batch * n, model.patch**2 * model.channels, d, trained)] += 1
    found[Product(batch, architecture.TIME_FREQUENCIES, d, trained)] += 1
    found[Product(batch, d, d, trained)] += 1
    return found


def attended(recipe: Recipe, stage: Stage, supervised: int) -> Counter[Attended]:
    """All attentions of one step."""
    found = Counter({Attended(recipe.optim.batch_size, True): recipe.model.depth})
    if isinstance(stage.method, SelfTranscendence) and supervised:
        found[Attended(2 * supervised, False)] += stage.method.teacher_depth
    return found


def _product_variant(product: Product, linear: Linear, device: torch.device, dtype: torch.dtype) -> Variant:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=product.trained)

    x, w, bias = leaf(product.rows, product.deep), leaf(product.wide, product.deep), leaf(product.wide)
    dy = torch.randn(product.rows, product.wide, device=device, dtype=dtype)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("product"):
            y = linear(x, w, bias)
            if product.trained:
                torch.autograd.grad(y, (x, w, bias), dy)

    return run


def _attention_variant(
    case: Attended, model: Model, attend: Attend, device: torch.device, dtype: torch.dtype
) -> Variant:
    n, head = model.tokens, model.width // model.heads
    shape = (case.batch, n, 3, model.heads, head)
    qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=case.trained)
    # As the output projection's gradient comes: (B, N, H, d) in memory.
    dout = torch.randn(case.batch, n, model.heads, head, device=device, dtype=dtype)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("attention"):
            out = attend_packed(attend, qkv)
            if case.trained:
                torch.autograd.grad(out, qkv, dout)

    return run


def measure(
    recipe: Recipe,
    stage: Stage,
    supervised: int,
    attend: Attend,
    linear: Linear,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
) -> Floor:
    """Times every distinct shape once per round, and adds up by how often it occurs."""
    multiplied, attentions = products(recipe, stage, supervised), attended(recipe, stage, supervised)
    model, n = recipe.model, recipe.model.tokens

    def seconds(make: Callable[[], Variant]) -> float:
        samples = interleave({"alone": make()}, device, effort)["alone"]
        return statistics.median(next(iter(samples.values())))

    return Floor(
        products=sum(
            count * seconds(lambda p=product: _product_variant(p, linear, device, dtype))  # type: ignore[misc]
            for product, count in multiplied.items()
        ),
        attention=sum(
            count * seconds(lambda c=case: _attention_variant(c, model, attend, device, dtype))  # type: ignore[misc]
            for case, count in attentions.items()
        ),
        product_flops=sum(count * product.flops for product, count in multiplied.items()),
        attention_flops=sum(
            count * case.batch * 2 * 2 * n * n * model.width * (3 if case.trained else 1)
            for case, count in attentions.items()
        ),
    )
