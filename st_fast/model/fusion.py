"""SPRINT's fusion (arXiv 2510.21986): what deep blocks made of some tokens, joined with the stream before them.

z = W·[f, g] + b of each token, f the stream before the deep blocks and g what they made of it; g is a mask token where
they left the token out, or where a sample's path is dropped. Shapes: B samples, N tokens, K kept ones, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fusion:
    """The fusion around blocks first + 1 … last; its parameters are the network's own, `fusion_proj` and `mask_token`.

    A token without g needs only the half of the product that f takes part in: W·[f, m] = W_f·f + (W_g·m + b).
    """

    def __init__(self, first: int, last: int, proj: nn.Linear, mask_token: nn.Parameter) -> None:
        self.first, self.last, self._proj, self._mask = first, last, proj, mask_token

    def joined(self, f: Tensor, g: Tensor, dropped: Tensor | None = None) -> Tensor:
        """f, g (B, K, D) → (B, K, D); `dropped` (B,) bool: samples that have mask tokens in place of g."""
        if dropped is not None:
            g = torch.where(dropped[:, None, None], self._mask, g)
        return F.linear(torch.cat((f, g), dim=-1), self._proj.weight, self._proj.bias)

    def masked(self, f: Tensor) -> Tensor:
        """f (B, N, D) → (B, N, D) of tokens that have no g."""
        width = f.shape[-1]
        of_f, of_g = self._proj.weight.split(width, dim=1)
        return F.linear(f, of_f, F.linear(self._mask.view(width), of_g, self._proj.bias))
