"""A stage's route: which of its blocks leave tokens out, how many and which, and until when. Imports no torch.

TREAD (arXiv 2501.04765) and SPRINT (arXiv 2510.21986). Only the student's training passes are routed: teachers, weight
averages, drawing and scoring run all tokens.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from st_fast.recipe.architecture import Model
from st_fast.recipe.error import show, wrong_value
from st_fast.recipe.keys import BelowOne, CountOrZero, Limit, StageStep, fixed, keys
from st_fast.recipe.methods import Method, supervision_name
from st_fast.recipe.tokens import TokenGroups, TokenPlan, TokenRoute, token_plan

Share = Annotated[float, Limit("above 0 and below 1", lambda share: 0 < share < 1)]
PUBLISHED_RATE = {"tread": 0.5, "sprint": 0.75}
BLOCKS_AFTER = {"tread": 3, "sprint": 2}
"""Blocks behind the route: TREAD's code puts the tokens back after its block depth − 4, which it counts from 0."""
SQUARE_RATE = 0.75
"""What structured keeping leaves out: three of each 2 × 2."""


@dataclass(frozen=True)
class Routing:
    """Blocks that run on a part of the tokens while a stage trains; the defaults are the published ones."""

    route: Literal["none", "tread", "sprint"] = fixed(
        "none", "Leave tokens out of blocks in the middle; behind them they go on with the state they had (tread), or "
        "all are fused with it (sprint)."
    )  # fmt: skip
    route_rate: Share | Literal["auto"] = fixed("auto", "Share of the tokens left out; auto: tread 0.5, sprint 0.75.")
    route_first: CountOrZero = fixed(2, "Blocks before the route.")
    route_last: CountOrZero | Literal["auto"] = fixed(
        "auto", "The last block of the route; auto: 3 blocks follow (tread), or 2 (sprint)."
    )
    route_select: Literal["auto", "random", "structured"] = fixed(
        "auto", "Keep any tokens, or one of each 2 × 2 (structured); auto: tread random, sprint structured."
    )
    path_drop: BelowOne = fixed(0.1, "Chance of a sample to go on without what the route's blocks made of it (sprint).")
    dense_after: StageStep = fixed(0, "After this many steps all tokens run; 0: never.")

    def runs(self, step: int) -> bool:
        """Whether the student's pass of this step, counted from 0, leaves tokens out."""
        return self.route != "none" and (self.dense_after == 0 or step < self.dense_after)

    def tokens(self, model: Model) -> TokenRoute | None:
        """What the network is told; None without a route."""
        if self.route == "none":
            return None
        last = model.depth - BLOCKS_AFTER[self.route] if self.route_last == "auto" else self.route_last
        return TokenRoute(self.route_first, last, self.rate, self.structured)

    def plan(self, model: Model, groups: TokenGroups | None, grid: tuple[int, int], step: int = 0) -> TokenPlan | None:
        """What becomes of the tokens of a grid at a step; None where all run alike."""
        drop = self.path_drop if self.route == "sprint" else 0.0
        return token_plan(grid[0] * grid[1], groups, self.tokens(model) if self.runs(step) else None, drop)

    def network(self, model: Model) -> Model:
        """The network that a stage with this route trains: with a fusion, where the route has one."""
        if self.route != "sprint" or (route := self.tokens(model)) is None:
            return model
        return replace(model, fusion_first=route.first, fusion_last=route.last)

    @property
    def rate(self) -> float:
        """Share of the tokens that is left out; 0 without a route."""
        return PUBLISHED_RATE.get(self.route, 0.0) if self.route_rate == "auto" else self.route_rate

    @property
    def structured(self) -> bool:
        """Whether one token of each 2 × 2 is kept."""
        return self.route_select == "structured" or (self.route_select == "auto" and self.route == "sprint")

    def check(self, stage: str, model: Model, method: Method) -> None:
        """RecipeError where the route of the stage of that name does not fit the network."""
        label = f"stage.{stage}"
        if self.route == "none":
            self._check_idle(label)
            return
        self._check_fusion(label, model)
        self._check_blocks(label, model)
        if self.structured:
            self._check_squares(label, model.grid, method.token_groups)
        plan = self.plan(model, method.token_groups, model.grid)
        assert plan is not None and plan.route is not None
        readers = {f"supervision = {show(supervision_name(method))}": method.tap} if method.reads_grid else {}
        readers |= {"the internal head": model.internal_head} if model.internal_head else {}
        for reader, tap in readers.items():
            if plan.route.around(tap):
                first, last = plan.route.first, plan.route.last
                why = f"{reader} reads block {tap} on the whole grid, where the route has left tokens out"
                raise wrong_value(f"{label}.route", self.route, f"a block up to {first} or above {last} for it", why)
        for of, kept in zip(plan.lengths, plan.kept, strict=True):
            if not 0 < kept < of:
                why = f"it keeps {'none' if kept == 0 else 'all'} of {of} tokens"
                raise wrong_value(f"{label}.route_rate", self.route_rate, "a share that keeps some of them", why)

    def _check_idle(self, label: str) -> None:
        for name in keys(Routing):
            if getattr(self, name) != getattr(Routing(), name):
                why, allowed = "without a route no token is left out", 'left out, or with route = "tread" or "sprint"'
                raise wrong_value(f"{label}.{name}", getattr(self, name), allowed, why)

    def _check_fusion(self, label: str, model: Model) -> None:
        """What of a fusion belongs to the network and what to its stage says the same."""
        if self.route == "tread" and self.path_drop != Routing.path_drop:
            why = 'route = "tread": behind it tokens go on with the state they had'
            raise wrong_value(f"{label}.path_drop", self.path_drop, 'left out, or with route = "sprint"', why)
        if self.route == "sprint" and model.network != "sit":
            why = f"model.network = {show(model.network)}, whose text runs through the same blocks"
            raise wrong_value(f"{label}.route", self.route, '"none" or "tread"', why)
        own = self.network(replace(model, fusion_first=0, fusion_last=0))
        if model.fusion_last and (own.fusion_first, own.fusion_last) != (model.fusion_first, model.fusion_last):
            why = f"model.fusion_first = {model.fusion_first}, model.fusion_last = {model.fusion_last}"
            raise wrong_value(f"{label}.route", self.route, '"none", or "sprint" with the same blocks', why)

    def _check_blocks(self, label: str, model: Model) -> None:
        """Some block runs all tokens; of SPRINT one before the route and one behind it."""
        found, depth, first = self.tokens(model), model.depth, self.route_first
        assert found is not None
        fused = self.route == "sprint"
        least = 3 if fused else 2
        if depth < least:
            why = f"model.depth = {depth}, and some block must run all tokens"
            raise wrong_value(f"{label}.route", self.route, f'"none", or {least} blocks or more', why)
        low, high = (1, depth - 2) if fused else (int(model.value_residual), depth - 1)
        if not low <= first <= high:
            why = "model.value_residual = true: the first block's values are of all tokens" * model.value_residual
            allowed = f"{low} to {high}, with blocks of the model behind it"
            raise wrong_value(f"{label}.route_first", first, allowed, why)
        most = depth - 1 if fused or first == 0 else depth
        if not first < found.last <= most:
            itself = f"block {found.last}, " if self.route_last == "auto" else ""
            why = f"{itself}with route_first = {first} and model.depth = {depth}"
            allowed = f"{first + 1} to {most}" + ", so that some block runs all tokens" * (first == 0)
            raise wrong_value(f"{label}.route_last", self.route_last, allowed, why)

    def _check_squares(self, label: str, grid: tuple[int, int], groups: TokenGroups | None) -> None:
        """One token of each 2 × 2 is a quarter of all, and there are whole squares."""
        key, value = f"{label}.route_select", self.route_select
        if self.rate != SQUARE_RATE:
            why = f"one token of each 2 x 2 is kept, and route_rate = {show(self.route_rate)}"
            raise wrong_value(key, value, f'"random", or route_rate = {SQUARE_RATE:g}', why)
        if grid[0] % 2 or grid[1] % 2:
            why = f"one token of each 2 x 2 is kept, and there are {grid[0]} x {grid[1]}"
            raise wrong_value(key, value, '"random", or latents of an even number of patches each way', why)
        if groups is not None:
            raise wrong_value(key, value, '"random"', "the stage's method has groups of tokens")
