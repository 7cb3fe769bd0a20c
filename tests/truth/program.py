"""What training computes, written down once more in plain float64, from the papers alone.

Nothing of st_fast is imported. The random draws are the format's: Philox's words, and what is made of them. Names:
B samples, C latent channels, S latent side, p patch, N = (S/p)² tokens, D width, H heads, ω guidance, λ weight.

Sources: SiT (arXiv 2401.08740), DiT (2212.09748), REPA (2410.06940), SRA (2505.02831), LayerSync (2510.12581),
Self-Transcendence (2601.07773), Internal Guidance (2512.24176), TREAD (2501.04765), Self-Flow (2603.06507), SRA with
dual time (2607.02508), AdamW (1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Draws(Protocol):
    """The random numbers of a run, in float64."""

    def record(self, sample: int) -> int:
        """The record that the run's sample of that number is."""

    def time(self, step: int, sample: int, group: int = 0) -> float:
        """t of a sample, or of a group of its tokens."""

    def whole(self, sample: int) -> float:
        """All tokens of a sample are one group where this is below the chance of it."""

    def chance(self, sample: int) -> float:
        """A sample's label is dropped where this is below the dropout."""

    def posterior(self, sample: int, shape: tuple[int, ...]) -> Tensor:
        """ξ."""

    def noise(self, sample: int, shape: tuple[int, ...]) -> Tensor:
        """ε."""

    def offset(self, sample: int, group: int = 0) -> float:
        """SRA's u in (0, 1)."""

    def path(self, sample: int) -> float:
        """A sample loses what a fusion's blocks made of it where this is below the chance."""

    def keys(self, sample: int, count: int) -> list[float]:
        """One a token; the first group has those with the least, and so on; a route keeps the least of each."""


@dataclass(frozen=True)
class Method:
    """How a stage supervises; `name` as the recipe has it."""

    name: str
    weight: float = 0.0
    depth: int = 0
    teacher_depth: int = 0
    cfg_scale: float = 1.0
    loss: str = "mse"
    target: str = "velocity"
    t_range: tuple[float, float] = (0.0, 1.0)
    mask: str = "sample"
    stop_step: int = 0
    time_offset: float = 0.2
    decay_start: int = 0
    decay_steps: int = 0
    target_guidance: float = 0.0
    first: int = 0
    last: int = 0
    """Blocks of a route, those from first + 1 to last, which leave a share of the tokens out; 0: no route."""
    rate: float = 0.5
    structured: bool = False
    dense_after: int = 0
    fused: bool = False
    path_drop: float = 0.0
    shares: tuple[float, ...] = ()
    """Of the tokens, in groups with a time each; none: an image has one time."""
    separated: bool = False
    whole: float = 0.0
    teacher_time: str = "sra"


@dataclass(frozen=True)
class Route:
    """What a batch's samples keep in blocks first + 1 … last: the places (B, K) of tokens, by their keys."""

    first: int
    last: int
    places: Tensor
    fused: bool = False
    lost: Tensor | None = None
    """(B,) bool: the samples with mask tokens in all places, of a fused route."""

    def of(self, values: Tensor) -> Tensor:
        """(B, N, …) → (B, K, …)."""
        return torch.stack([sample[kept] for sample, kept in zip(values, self.places, strict=True)])

    def back(self, kept: Tensor, stored: Tensor) -> Tensor:
        """The kept tokens (B, K, D) in their places among the stored ones (B, N, D)."""
        samples = []
        for own, old, places in zip(kept, stored, self.places.tolist(), strict=True):
            samples.append(torch.stack([own[places.index(n)] if n in places else old[n] for n in range(len(old))]))
        return torch.stack(samples)


@dataclass(frozen=True)
class Setting:
    """The numbers of a run."""

    depth: int
    heads: int
    patch: int
    channels: int
    classes: int
    dropout: float
    qk_norm: bool
    path: str
    batch: int
    scale: float
    lr: float
    warmup: int
    betas: tuple[float, float]
    eps: float
    decay: float
    clip: float
    ema: float


@dataclass
class State:
    """What training changes: the network and the method's heads, AdamW's two averages of each, and the network's."""

    model: Weights
    heads: Weights
    ema: Weights
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)
    updates: int = 0


# ---------------------------------------------------------------------------------------------------- the network


def positions(width: int, side: int) -> Tensor:
    """(side², width): sines and cosines of the column, then of the row."""
    table = torch.zeros(side * side, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                omega = 10_000.0 ** (-i / quarter)
                table[row * side + column, i] = math.sin(column * omega)
                table[row * side + column, quarter + i] = math.cos(column * omega)
                table[row * side + column, 2 * quarter + i] = math.sin(row * omega)
                table[row * side + column, 3 * quarter + i] = math.cos(row * omega)
    return table


def linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x·Wᵀ + b."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """The tanh form."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalised(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def tokens_of(s: Setting, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(B, C, S, S) → (B, N, D)."""
    p, side = s.patch, x.shape[-1] // s.patch
    rows = []
    for i in range(side):
        for j in range(side):
            piece = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]  # (B, C, p, p)
            rows.append(torch.einsum("bcij,dcij->bd", piece, w["x_embedder.proj.weight"]))
    embedded = torch.stack(rows, dim=1) + w["x_embedder.proj.bias"]
    return embedded + positions(embedded.shape[-1], side)


def latents_of(s: Setting, patches: Tensor) -> Tensor:
    """(B, N, p·p·C), channels last within a patch → (B, C, S, S)."""
    p, side = s.patch, math.isqrt(patches.shape[1])
    rows = []
    for i in range(side):
        row = [patches[:, i * side + j].view(-1, p, p, s.channels).permute(0, 3, 1, 2) for j in range(side)]
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)


def condition(w: Mapping[str, Tensor], t: Tensor, labels: Tensor) -> Tensor:
    """(B, D) of the time and the label, or with each token's time (B, N) its own, (B, N, D); before SiLU."""
    angles = t[..., None] * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    time = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", waves)))
    label = w["y_embedder.embedding_table.weight"][labels]
    return time + (label if t.ndim == 1 else label[:, None])


def attention(s: Setting, w: Mapping[str, Tensor], block: str, y: Tensor, sees: Tensor | None = None) -> Tensor:
    """Softmax attention with LayerNorm on queries and keys where the setting says so.

    sees (B, N, N): whether a token attends to another.
    """
    batch, count, width = y.shape
    d = width // s.heads
    q, k, v = linear(w, f"{block}.attn.qkv", y).chunk(3, dim=-1)
    out = torch.empty_like(y)
    parts = []
    for h in range(s.heads):
        here = slice(h * d, (h + 1) * d)
        qh, kh, vh = q[..., here], k[..., here], v[..., here]
        if s.qk_norm:
            qh = normalised(qh) * w[f"{block}.attn.q_norm.weight"] + w[f"{block}.attn.q_norm.bias"]
            kh = normalised(kh) * w[f"{block}.attn.k_norm.weight"] + w[f"{block}.attn.k_norm.bias"]
        scores = qh @ kh.transpose(1, 2) / math.sqrt(d)
        if sees is not None:
            scores = torch.where(sees, scores, -math.inf)
        parts.append(torch.softmax(scores, dim=-1) @ vh)
    out = torch.cat(parts, dim=-1)
    assert out.shape == (batch, count, width)
    return linear(w, f"{block}.attn.proj", out)


def network(
    s: Setting, w: Mapping[str, Tensor], x: Tensor, t: Tensor, labels: Tensor, route: Route | None = None,
    sees: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The velocity (B, C, S, S), and the stream (B, N, D) before the first block and after each.

    t (B,), or each token's (B, N). Within a route the stream is that of the kept tokens (B, K, D); behind it the others
    go on as they were, or all are fused with what they were.
    """
    c = silu(condition(w, t, labels))
    c = c[:, None] if t.ndim == 1 else c  # (B, 1, D) or (B, N, D)
    whole_c, whole_sees = c, sees
    stream = stored = tokens_of(s, w, x)
    streams = [stream]
    for number in range(s.depth):
        block = f"blocks.{number}"
        if route is not None and number == route.first:
            stored, stream = stream, route.of(stream)
            c = c if t.ndim == 1 else route.of(c)
            sees = None if sees is None else route.of(route.of(sees).transpose(1, 2)).transpose(1, 2)
        modulation = linear(w, f"{block}.adaLN_modulation.1", c)  # (B, 1 or N, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        stream = stream + gate1 * attention(s, w, block, normalised(stream) * (1 + scale1) + shift1, sees)
        hidden = gelu(linear(w, f"{block}.mlp.fc1", normalised(stream) * (1 + scale2) + shift2))
        stream = stream + gate2 * linear(w, f"{block}.mlp.fc2", hidden)
        streams.append(stream)
        if route is not None and number + 1 == route.last:
            if route.fused:
                masks = w["mask_token"].expand_as(stored)
                deep = torch.where(route.lost[:, None, None], masks, route.back(stream, masks))
                stream = linear(w, "fusion_proj", torch.cat([stored, deep], dim=2))
            else:
                stream = route.back(stream, stored)
            c, sees = whole_c, whole_sees
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    velocity = latents_of(s, linear(w, "final_layer.linear", normalised(stream) * (1 + scale) + shift))
    return velocity, streams


def internal(s: Setting, w: Mapping[str, Tensor], stream: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The velocity (B, C, S, S) of the second final layer, of the stream (B, N, D) of its block."""
    shift, scale = linear(w, "final_layer_xr.adaLN_modulation.1", silu(condition(w, t, labels))).chunk(2, dim=-1)
    modulated = normalised(stream) * (1 + scale[:, None]) + shift[:, None]
    return latents_of(s, linear(w, "final_layer_xr.linear", modulated))


# ------------------------------------------------------------------------------------------- from data to a target


def path(s: Setting, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and dx_t/dt; t = 1 is noise. t (B,), or each pixel's (B, 1, S, S)."""
    t = t.view(-1, 1, 1, 1) if t.ndim == 1 else t
    if s.path == "linear":
        return (1 - t) * x + t * noise, noise - x
    half = math.pi / 2
    cos, sin = torch.cos(half * t), torch.sin(half * t)
    return cos * x + sin * noise, half * (cos * noise - sin * x)


@dataclass(frozen=True)
class Batch:
    """A global batch."""

    x: Tensor
    noise: Tensor
    x_t: Tensor
    velocity: Tensor
    t: Tensor
    labels: Tensor
    dropped: Tensor
    """The labels as the student sees them."""
    samples: list[int]
    records: list[int]
    groups: Groups | None = None


@dataclass(frozen=True)
class Groups:
    """The groups of a batch's tokens."""

    number: Tensor
    """(B, N): each token's."""
    times: Tensor
    """(B, G)."""
    whole: Tensor
    """(B,): samples that are one group."""
    separated: bool
    side: int
    """Tokens in a row."""

    def each(self, times: Tensor) -> Tensor:
        """(B, G) → (B, N)."""
        return times.gather(1, self.number)

    def pixels(self, times: Tensor, patch: int) -> Tensor:
        """(B, G) → (B, 1, S, S)."""
        image = self.each(times).view(len(times), 1, self.side, self.side)
        return image.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    @property
    def sees(self) -> Tensor | None:
        """(B, N, N): which tokens attend to which, if not all to all."""
        same = self.number[:, :, None] == self.number[:, None, :]
        return same | self.whole[:, None, None] if self.separated else None


def counts_of(shares: tuple[float, ...], tokens: int) -> list[int]:
    """Whole numbers of tokens: rounded down, and what is left to those that lost most by it."""
    found = [math.floor(share * tokens + 1e-9) for share in shares]
    lost = sorted(range(len(shares)), key=lambda i: found[i] - shares[i] * tokens)
    for i in lost[: tokens - sum(found)]:
        found[i] += 1
    return found


def groups_of(method: Method, draws: Draws, samples: list[int], step: int, side: int) -> Groups | None:
    """The groups of the tokens of these samples, if the method has any."""
    if not method.shares:
        return None
    numbers, times, whole = [], [], []
    counts = counts_of(method.shares, side * side)
    for sample in samples:
        keys = draws.keys(sample, side * side)
        row = [0] * (side * side)
        order, group = sorted(range(side * side), key=keys.__getitem__), 0
        for place, token in enumerate(order):
            while place >= sum(counts[: group + 1]):
                group += 1
            row[token] = group
        numbers.append(row)
        whole.append(draws.whole(sample) < method.whole)
        drawn = [draws.time(step, sample, number) for number in range(len(counts))]
        times.append([drawn[0]] * len(counts) if whole[-1] else drawn)
    tensors = torch.tensor(numbers), torch.tensor(times, dtype=torch.float64), torch.tensor(whole)
    return Groups(*tensors, method.separated, side)


def batch_of(s: Setting, method: Method, moments: Tensor, labels: Tensor, draws: Draws, step: int) -> Batch:
    """The batch of a step, counted from 0: moments (records, 2C, S, S) hold means and standard deviations."""
    samples = list(range(step * s.batch, (step + 1) * s.batch))
    records = [draws.record(sample) for sample in samples]
    mean, std = moments[records, : s.channels], moments[records, s.channels :]
    shape = tuple(mean.shape[1:])
    x = s.scale * (mean + std * torch.stack([draws.posterior(sample, shape) for sample in samples]))
    noise = torch.stack([draws.noise(sample, shape) for sample in samples])
    t = torch.tensor([draws.time(step, sample) for sample in samples], dtype=torch.float64)
    true = labels[records]
    lost = torch.tensor([draws.chance(sample) < s.dropout for sample in samples])
    groups = groups_of(method, draws, samples, step, shape[-1] // s.patch)
    x_t, velocity = path(s, x, noise, t if groups is None else groups.pixels(groups.times, s.patch))
    return Batch(x, noise, x_t, velocity, t, true, torch.where(lost, s.classes, true), samples, records, groups)


def masked(method: Method, t: Tensor, losses: Tensor) -> Tensor:
    """The three meanings of "supervised at times in the range", for losses (B,)."""
    low, high = method.t_range
    m = ((t >= low) & (t <= high)).double()
    if method.mask == "sample":
        return (m * losses).mean()
    if method.mask == "sample_mean":
        return (m * losses).sum() / m.sum().clamp(min=1)
    return m.mean() * losses.mean()


def mlp(heads: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """REPA's projector: three layers with SiLU between."""
    return linear(heads, f"{name}.4", silu(linear(heads, f"{name}.2", silu(linear(heads, f"{name}.0", x)))))


def two_layers(heads: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """SRA's head."""
    return linear(heads, f"{name}.linear2", silu(linear(heads, f"{name}.linear1", x)))


def minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, D) twice → (B,)."""
    return -((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean(1)


def route_of(s: Setting, method: Method, draws: Draws, batch: Batch, step: int) -> Route | None:
    """The step's route, if the method has one and it has not ended."""
    ended = method.dense_after and step >= method.dense_after
    if method.last == 0 or (ended and not method.fused):
        return None
    side = batch.x.shape[-1] // s.patch
    chosen = []
    for sample in batch.samples:
        keys = draws.keys(sample, side * side)
        pool = list(range(side * side))
        if ended:
            chosen.append(pool)
            continue
        if method.structured:
            corners = [(i, j) for i in range(0, side, 2) for j in range(0, side, 2)]
            squares = [[(i + a) * side + j + b for a in (0, 1) for b in (0, 1)] for i, j in corners]
            pool = [min(square, key=keys.__getitem__) for square in squares]
        order = sorted(pool, key=keys.__getitem__)
        if not method.shares:
            chosen.append(order[: round(side * side * (1 - method.rate))])
            continue
        first, kept = 0, []
        for count in counts_of(method.shares, side * side):
            kept += order[first : first + math.floor(count * (1 - method.rate) + 0.5)]
            first += count
        chosen.append(kept)
    lost = torch.tensor([draws.path(sample) < method.path_drop for sample in batch.samples])
    return Route(method.first, method.last, torch.tensor(chosen), method.fused, lost)


def teachers_route(method: Method, tokens: int, batch: Batch) -> Route | None:
    """All tokens, where a fusion is part of the network that an average runs."""
    if not method.fused:
        return None
    places = torch.arange(tokens).expand(len(batch.samples), -1)
    return Route(method.first, method.last, places, True, torch.zeros(len(batch.samples), dtype=torch.bool))


def patches_of(s: Setting, x: Tensor) -> Tensor:
    """(B, C, S, S) → (B, N, C·p·p)."""
    p, side = s.patch, x.shape[-1] // s.patch
    cut = [x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten(1) for i in range(side) for j in range(side)]
    return torch.stack(cut, dim=1)


def auxiliary(
    s: Setting, method: Method, state: State, teacher: Weights, draws: Draws, batch: Batch, streams: list[Tensor],
    features: list[Tensor], step: int, route: Route | None,
) -> Tensor:  # fmt: skip
    """The supervision's part of the loss, weighted. `features`: of each image encoder, (records, N, D_j).

    Of a stream within the route only the kept tokens are compared.
    """
    if method.name == "none" or (method.stop_step and step >= method.stop_step):
        return torch.zeros((), dtype=torch.float64)
    h = streams[method.depth]
    taps = [method.depth] + [method.teacher_depth] * (method.name == "layer_sync")
    within = route is not None and any(route.first < tap <= route.last for tap in taps)

    def seen(values: Tensor) -> Tensor:
        return values if route is None or not within or values.shape[1] == route.places.shape[1] else route.of(values)

    h = seen(h)
    if method.name == "velocity_head":
        flat = linear(state.heads, "projectors_final.linear", normalised(mlp(state.heads, "projectors", h)))
        guess = flat.unflatten(2, (s.patch**2, s.channels)).transpose(2, 3).flatten(2)  # channels first, as the wanted
        wanted = seen(patches_of(s, batch.velocity if method.target == "velocity" else batch.x))
        losses = ((guess - wanted) ** 2).mean((1, 2))
    elif method.name == "self_transcendence":
        with torch.no_grad():
            null = torch.full_like(batch.labels, s.classes)
            f_y = network(s, teacher, batch.x_t, batch.t, batch.labels)[1][method.teacher_depth]
            f_0 = network(s, teacher, batch.x_t, batch.t, null)[1][method.teacher_depth]
            f = seen(f_0 + method.cfg_scale * (f_y - f_0))
        q = mlp(state.heads, "projectors", h)
        if method.loss == "cosine":
            losses = minus_cosine(q, f)
        else:
            f = f / torch.sqrt((f**2).mean(-1, keepdim=True)) if method.loss == "normalized_mse" else f
            losses = ((q - f) ** 2).mean((1, 2))
    elif method.name == "internal_guidance":
        losses = ((internal(s, state.model, h, batch.t, batch.dropped) - batch.velocity) ** 2).mean((1, 2, 3))
    elif method.name == "layer_sync":
        losses = minus_cosine(h, seen(streams[method.teacher_depth].detach()))
    elif method.name == "sra":
        u = torch.tensor([draws.offset(sample) for sample in batch.samples], dtype=torch.float64)
        with torch.no_grad():
            earlier = (batch.t - method.time_offset * u).clamp(min=0)
            x_t = path(s, batch.x, batch.noise, earlier)[0]
            f = seen(network(s, state.ema, x_t, earlier, batch.dropped)[1][method.teacher_depth])
        q = two_layers(state.heads, "ap_head", h)
        if method.loss == "cosine":
            losses = minus_cosine(q, f)
        else:
            gap, beta = (q - f).abs(), 0.05
            losses = torch.where(gap < beta, gap**2 / (2 * beta), gap - beta / 2).mean((1, 2))
    elif method.name == "self_flow":
        lowest = batch.groups.times.amin(1)
        with torch.no_grad():
            x_t = path(s, batch.x, batch.noise, lowest)[0]
            whole = teachers_route(method, streams[0].shape[1], batch)
            f = seen(network(s, state.ema, x_t, lowest, batch.dropped, whole)[1][method.teacher_depth])
        losses = minus_cosine(two_layers(state.heads, "projector", h), f)
    elif method.name == "sra_dual":
        groups, times = batch.groups, batch.groups.times
        if method.teacher_time == "self_flow":
            times = times.amin(1, keepdim=True).expand_as(times)
        if method.teacher_time == "sra":
            u = torch.tensor([[draws.offset(b, g) for g in range(times.shape[1])] for b in batch.samples]).double()
            u = torch.where(groups.whole[:, None], u[:, :1], u)
            times = (times - method.time_offset * u).clamp(min=0)
        with torch.no_grad():
            x_t = path(s, batch.x, batch.noise, groups.pixels(times, s.patch))[0]
            whole = teachers_route(method, streams[0].shape[1], batch)
            found = network(s, state.ema, x_t, groups.each(times), batch.dropped, whole, groups.sees)[1]
            f = seen(found[method.teacher_depth])
        losses = minus_cosine(two_layers(state.heads, "ap_head", h), f)
    else:
        kinds = [
            minus_cosine(mlp(state.heads, f"projectors.{j}", h), seen(g[batch.records])) for j, g in enumerate(features)
        ]
        losses = torch.stack(kinds).mean(0)
    faded = 1.0
    if method.decay_steps and step > method.decay_start:
        faded = 0.1 ** ((step - method.decay_start) / method.decay_steps)
    return faded * method.weight * masked(method, batch.t, losses)


# ------------------------------------------------------------------------------------------------------ the update


def update(s: Setting, state: State, gradients: Weights) -> float:
    """Clip, AdamW, weight average; returns the gradients' norm before the clip. Keys: model.* and heads.*."""
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    shrink = min(1.0, s.clip / (norm + 1e-6)) if s.clip else 1.0
    state.updates += 1
    k, rate = state.updates, s.lr * min(1.0, state.updates / max(s.warmup, 1))
    for part in ("model", "heads"):
        weights = getattr(state, part)
        for name in weights:
            key = f"{part}.{name}"
            g = shrink * gradients[key]
            m = s.betas[0] * state.first.get(key, torch.zeros_like(g)) + (1 - s.betas[0]) * g
            v = s.betas[1] * state.second.get(key, torch.zeros_like(g)) + (1 - s.betas[1]) * g * g
            state.first[key], state.second[key] = m, v
            root = torch.sqrt(v / (1 - s.betas[1] ** k)) + s.eps
            weights[name] = weights[name] * (1 - rate * s.decay) - rate * (m / (1 - s.betas[0] ** k)) / root
    for name, weight in state.model.items():
        state.ema[name] = s.ema * state.ema[name] + (1 - s.ema) * weight
    return norm


def train(
    s: Setting, method: Method, state: State, teacher: Weights, draws: Draws, moments: Tensor, labels: Tensor,
    features: list[Tensor], step: int,
) -> tuple[float, float, float]:  # fmt: skip
    """One step, counted from 0: changes the state and returns both losses and the gradients' norm."""
    leaves = {f"{part}.{name}": w for part in ("model", "heads") for name, w in getattr(state, part).items()}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    batch = batch_of(s, method, moments, labels, draws, step)
    route, groups = route_of(s, method, draws, batch, step), batch.groups
    t, sees = (batch.t, None) if groups is None else (groups.each(groups.times), groups.sees)
    guess, streams = network(s, state.model, batch.x_t, t, batch.dropped, route, sees)
    wanted = batch.velocity
    if method.target_guidance:
        with torch.no_grad():
            shallow = internal(s, state.model, streams[method.depth], batch.t, batch.dropped)
            wanted = wanted + method.target_guidance * (guess - shallow)
    denoise = ((guess - wanted) ** 2).mean((1, 2, 3)).mean()
    aux = auxiliary(s, method, state, teacher, draws, batch, streams, features, step, route)
    found = torch.autograd.grad(denoise + aux, list(leaves.values()), allow_unused=True)
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    gradients = {
        key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(leaves.items(), found, strict=True)
    }
    norm = update(s, state, gradients)
    return denoise.item(), aux.item(), norm


def as_float64(tensors: Mapping[str, Tensor]) -> Weights:
    """Copies."""
    return {name: tensor.detach().to(torch.float64, copy=True) for name, tensor in tensors.items()}


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's integers (Salmon et al., SC 2011)."""
    (a, b, c, d), (k, j) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ j, p % 2**32
        k, j = (k + 0x9E3779B9) % 2**32, (j + 0xBB67AE85) % 2**32
    return a, b, c, d


def words(seed: int, purpose: int, sample: int, count: int) -> list[int]:
    """The 32-bit words of a draw: the counter is (block, low half of the sample's number, high half, purpose)."""
    found: list[int] = []
    for block in range(-(-count // 4)):
        found += philox((block, sample % 2**32, sample // 2**32, purpose), (seed % 2**32, seed // 2**32 % 2**32))
    return found[:count]


def normals(seed: int, purpose: int, sample: int, shape: tuple[int, ...]) -> Tensor:
    """Box–Muller in pairs: u from the first word with its last bit set, the angle from the second."""
    count = math.prod(shape)
    drawn = words(seed, purpose, sample, 2 * (-(-count // 2)))
    values = []
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        radius, angle = math.sqrt(-2 * math.log((first | 1) / 2**32)), 2 * math.pi * second / 2**32
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(values[:count], dtype=torch.float64).view(shape)


def permutation(seed: int, purpose: int, number: int, size: int, part: int = 0) -> np.ndarray:
    """The order of random 64-bit keys."""
    keys = np.random.Philox(key=seed % 2**64, counter=[0, number, purpose, part]).random_raw(size)
    return np.argsort(keys, kind="stable")
