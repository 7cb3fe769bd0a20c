"""A plain block of DiT (arXiv 2212.09748) in PyTorch, for the example, the tests and the benchmark; and a stopwatch."""

import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention over all tokens, with the parameters' names of timm."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):  # (B, N, D)
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class DiTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):  # (B, N, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def milliseconds(block, x, c):
    """Of one forward and backward."""
    start = time.perf_counter()
    block(x, c).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def compare(plain, fast, x, c, rounds=30):
    """Medians over rounds of the time of each, measured in turns, in milliseconds, and of the ratio."""
    x, c = x.clone().requires_grad_(), c.clone().requires_grad_()
    pairs = [(milliseconds(plain, x, c), milliseconds(fast, x, c)) for _ in range(rounds + 2)][2:]
    ratio = statistics.median(before / after for before, after in pairs)
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs), ratio
