"""What diffusion transformers share: what the trainer, the methods and the sampler know of a network.

A network reads noisy latents, their times and a *condition*: a tensor (B, …) whose meaning is the network's own (class
labels of a `SiT`, the states of a caption's tokens for an `MMDiT`). `null_condition` stands for none of it. Nothing
outside of a network and of what reads its data knows more of conditions than that.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model import flow
from st_fast.model.fusion import Fusion
from st_fast.model.layers import (
    FinalLayer,
    PatchEmbed,
    Run,
    ScaleWeight,
    TimestepEmbedder,
    adaln_options,
    rope_angles,
    sincos_positions,
    unpatchify,
    weighed,
)
from st_fast.model.layout import Layout
from st_fast.model.load import Pretrained
from st_fast.model.side_stream import Branches, batched
from st_fast.model.walk import Walk, of_groups
from st_fast.recipe.architecture import INTERNAL as INTERNAL
from st_fast.recipe.schema import Model


class DiffusionTransformer(Pretrained):
    """The velocity model v̂(x_t, t, condition). `config` must be resolved (depth, width, heads, patch > 0).

    Shapes: B samples, C latent channels, H and W a latent's height and width, N tokens of an image, D width. Latents
    may be of the config's shape or of another one, the same in a batch: only their positions depend on it.
    """

    config: Model
    kernels: KernelTable
    x_embedder: PatchEmbed
    t_embedder: TimestepEmbedder
    pos_embed: nn.Parameter | None
    """(1, N, D); None where positions are those of RoPE alone."""
    register_tokens: nn.Parameter
    """(1, R, D), only there if `config.registers` is R > 0."""
    blocks: nn.ModuleList
    """What FSDP and the compiler take one by one."""
    final_layer: FinalLayer
    final_layer_xr: FinalLayer
    """The internal head (Internal Guidance, arXiv 2512.24176), after block `config.internal_head`; only there if that
    is above 0."""
    fusion_proj: nn.Linear
    """SPRINT's fusion (`st_fast.model.fusion`), only there if `config.fusion_last` is above 0, as the next one is."""
    mask_token: nn.Parameter
    """(1, 1, D)."""
    run_block: Run

    @abstractmethod
    def modulation_layers(self, depth: int) -> list[nn.Linear]:
        """From SiLU(c) to what modulates the first `depth` blocks and the part after them; run before any block."""

    @abstractmethod
    def norm_weights(self, depth: int) -> list[ScaleWeight | None]:
        """Of the norms whose modulations `modulation_layers` make, in their order; run before any block too."""

    @abstractmethod
    def set_run_attention(self, run: Run) -> None:
        """How every block calls its attention: as `run(attention, *inputs)`."""

    @abstractmethod
    def null_condition(self, count: int) -> Tensor:
        """(count, …): what stands for no condition, `count` times, on the weights' device."""

    @abstractmethod
    def _trunk(
        self, tokens: Tensor, t: Tensor, condition: Tensor, depth: int, taps: tuple[int, ...] = (),
        layout: Layout | None = None, rope: Tensor | None = None, skip: bool = False,
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:  # fmt: skip
        """Runs blocks 1..depth; returns the streams after `taps` (0: the tokens), after `depth`, and the next y.

        With INTERNAL among the taps, also the internal head's patches; these and the last two are in the order of the
        layout, if there is one. `rope` is `self.rope` of the tokens' grid. The stream after `depth` has the registers
        in front.
        """

    @abstractmethod
    def use_null(self, null: Tensor) -> None:
        """What the data has for no condition, (…), where that is not the network's own."""

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return self.x_embedder.proj.weight.device

    @property
    def constants(self) -> set[nn.Parameter]:
        """Parameters that are stored with the others and never trained."""
        return set() if self.pos_embed is None else {self.pos_embed}

    def _initialise(self, zero: Sequence[nn.Linear]) -> None:
        """Xavier for linear layers; `zero`, the modulations, and the final layer at zero if the recipe says so."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        self._initialise_condition()
        for layer in self.t_embedder.layers:
            nn.init.normal_(layer.weight, std=0.02)
        if self.config.zero_init:
            for layer in (*zero, self.final_layer.linear):
                nn.init.zeros_(layer.weight)
        if self.config.internal_head:  # drawn last, so that all else is drawn as without it
            self.final_layer_xr = FinalLayer(self.config)
            for layer in (self.final_layer_xr.linear, cast(nn.Linear, self.final_layer_xr.adaLN_modulation[1])):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
                if self.config.zero_init:
                    nn.init.zeros_(layer.weight)
        if self.config.fusion_last:
            width = self.config.width
            self.fusion_proj, self.mask_token = nn.Linear(2 * width, width), nn.Parameter(torch.zeros(1, 1, width))
            nn.init.xavier_uniform_(self.fusion_proj.weight)
            nn.init.zeros_(self.fusion_proj.bias)
        if self.config.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, self.config.registers, self.config.width))
            nn.init.normal_(self.register_tokens, std=0.02)

    @property
    def _fusion(self) -> Fusion | None:
        config = self.config
        if not config.fusion_last:
            return None
        return Fusion(config.fusion_first, config.fusion_last, self.fusion_proj, self.mask_token)

    @abstractmethod
    def _initialise_condition(self) -> None:
        """Draws what embeds the condition."""

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of latents (B, C, H, W)."""
        return x.shape[2] // self.config.patch, x.shape[3] // self.config.patch

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """(1, N, D): what is added to a grid's tokens, `pos_embed` for the config's own; None with RoPE alone.

        Any other grid has sin-cos positions whose unit is scaled by √(own tokens / its tokens), so that equal areas
        have coordinates of equal range: an image of the same area in other proportions keeps the unit, and one of twice
        the side has coordinates in half steps.
        """
        if grid == self.config.grid or self.pos_embed is None:
            return self.pos_embed
        return self._placed(sincos_positions, self.config.width, grid, self.pos_embed.dtype)

    def rope(self, grid: tuple[int, int]) -> Tensor | None:
        """(1, R + N, d) float32: the angles of the registers, which are not turned, and of a grid's tokens.

        None without RoPE. Units are scaled as those of `positions`.
        """
        if not self.config.rope:
            return None
        return self._placed(self._angles, self.config.head, grid, torch.float32)

    def _angles(self, head: int, grid: tuple[int, int], unit: float) -> Tensor:
        unturned = torch.cat((torch.ones(head // 2), torch.zeros(head // 2))).expand(1, self.config.registers, -1)
        return torch.cat((unturned, rope_angles(head, grid, unit)), dim=1)

    def _placed(
        self, make: Callable[[int, tuple[int, int], float], Tensor], width: int, grid: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """`make` of a grid, kept."""
        key = grid, self.device, dtype, width
        if (found := self._other_positions.get(key)) is None:
            unit = math.sqrt(self.config.tokens / math.prod(grid))
            with torch.device("cpu"):
                found = make(width, grid, unit)
            found = self._other_positions[key] = found.to(self.device, dtype)
        return found

    @cached_property
    def _other_positions(self) -> dict[tuple[tuple[int, int], torch.device, torch.dtype, int], Tensor]:
        """What `positions` and `rope` have computed; no part of the weights."""
        return {}

    def embed_tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, N, D): patches with positions, in the weights' dtype."""
        tokens, positions = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)), self.positions(self.grid_of(x))
        return tokens if positions is None else tokens + positions

    def _walk(
        self, layout: Layout | None, tokens: Tensor, following: Sequence[tuple[Tensor, Tensor]], rope: Tensor | None
    ) -> Walk:
        """Of the image's tokens, with the network's own fusion and registers."""
        registers = self.register_tokens if self.config.registers else None
        return Walk(self.config, self.kernels, layout, tokens, following, rope, self._fusion, registers)

    def _following(
        self, modulations: Sequence[Tensor], weights: Sequence[ScaleWeight | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """Shift and scale (B, D) of each modulation, for the input of its attention or of the final layer.

        A block's modulation (B, 6D) has shift, scale and gate of its attention, then of its MLP; the last one (B, 2D)
        shift and scale. Those of groups are (B, G, …). The norm's weight is in the scale.
        """
        pairs = []
        for modulation, weight in zip(modulations, weights, strict=True):
            shift, scale, *_ = modulation.chunk(modulation.shape[-1] // self.config.width, dim=-1)
            scale, shift = weighed(weight, scale, shift)
            pairs.append((shift, scale))
        return pairs

    def _modulations(self, c: Tensor, depth: int) -> list[Tensor]:
        """What `modulation_layers` make of SiLU(c), (B, D) or each group's (B, G, D).

        As one product the weights are laid end to end for it, which costs a pass over them; names stay as published.
        """
        layers = self.modulation_layers(depth)
        if self.config.modulation == "per_block":
            return [layer(c) for layer in layers]
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        # One split, whose backward is one concatenation: slices would each fill a gradient of the whole width.
        return list(F.linear(c, weight, bias).split([layer.out_features for layer in layers], dim=-1))

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor, tap: int | tuple[int, ...] = 0, layout: Layout | None = None
    ) -> tuple[Tensor, Any]:
        """x (B, C, H, W), t (B,), condition (B, …) → velocity (B, C, H, W) and the stream after block `tap` (B, N, D).

        Blocks count from 1; with tap = 0 the second result is the embedded input, with INTERNAL the velocity of the
        internal head (B, C, H, W). A tuple of blocks gives a tuple of their streams. The streams are those of the
        image's tokens, row by row; within a route those of the kept tokens (B, K, D), in the layout's order. With
        several groups of tokens t is (B, G). ValueError for INTERNAL where there is no such head.
        """
        taps = tap if isinstance(tap, tuple) else (tap,)
        if INTERNAL in taps and not self.config.internal_head:
            raise ValueError("tap = INTERNAL: the network has no internal head (internal_head = 0)")
        rope = self.rope(self.grid_of(x))
        tapped, _, y = self._trunk(self.embed_tokens(x), t, condition, self.config.depth, taps, layout, rope)
        velocity = self._velocity(self.final_layer(y), x, t, layout)
        if INTERNAL in taps:
            tapped[INTERNAL] = self._velocity(tapped[INTERNAL], x, t, layout)
        return velocity, tuple(tapped[number] for number in taps) if isinstance(tap, tuple) else tapped[tap]

    def without_path(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The velocity (B, C, H, W) where mask tokens stand for what the blocks within the fusion make; they don't run.

        ValueError where the network has no fusion.
        """
        if not self.config.fusion_last:
            raise ValueError("the network has no fusion (fusion_last = 0), within which blocks could be skipped")
        rope = self.rope(self.grid_of(x))
        y = self._trunk(self.embed_tokens(x), t, condition, self.config.depth, rope=rope, skip=True)[2]
        return self._velocity(self.final_layer(y), x, t, None)

    def _velocity(self, patches: Tensor, x: Tensor, t: Tensor, layout: Layout | None) -> Tensor:
        """What a final layer gives (B, N, p·p·C), in the layout's order, as a velocity (B, C, H, W).

        x (B, C, H, W) and t (B,), or (B, G) with several groups, are the network's input.
        """
        grid, patch = self.grid_of(x), self.config.patch
        patches = patches if layout is None else layout.restored(patches)
        output = unpatchify(patches, patch, self.config.channels, grid)
        if self.config.prediction != "x":
            return output
        return flow.velocity_of_x(output, x, t if layout is None or t.ndim == 1 else layout.pixel_times(t, grid, patch))

    def _internal_patches(self, walk: Walk, c: Tensor) -> Tensor:
        """The internal head of the stream (B, N, D) where it is now, and of SiLU(c) (B, D): (B, N, p·p·C)."""
        shift, scale = self.final_layer_xr.adaLN_modulation[1](c).chunk(2, dim=-1)
        scale, shift = weighed(self.final_layer_xr.norm_final, scale, shift)
        options = adaln_options(self.config) | of_groups(walk.groups)
        return self.final_layer_xr(self.kernels.norm_modulate(walk.image(walk.x), shift, scale, **options))

    def features(self, x: Tensor, t: Tensor, condition: Tensor, depth: int, layout: Layout | None = None) -> Tensor:
        """The stream after block `depth` (B, N, D), row by row; nothing after it is computed."""
        rope = self.rope(self.grid_of(x))
        return self._trunk(self.embed_tokens(x), t, condition, depth, (depth,), layout, rope)[0][depth]

    def guided_features(
        self, x: Tensor, t: Tensor, condition: Tensor, depth: int, branches: Branches = batched
    ) -> tuple[Tensor, Tensor]:
        """The streams after block `depth` with the condition and with the null condition, each (B, N, D).

        Both share the patch embedding and run as `branches` has it; nothing after block `depth` is computed.
        """

        rope = self.rope(self.grid_of(x))

        def features(tokens: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self._trunk(tokens, t, condition, depth, (depth,), rope=rope)[0][depth]

        return branches(features, self.embed_tokens(x), t, condition, self.null_condition(len(condition)))
