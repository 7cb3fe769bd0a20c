"""Which tokens are in which group and on a route: exact counts, uniform choices, and nothing but ordinals decides."""

import pytest
import torch

from st_fast.recipe.tokens import TokenGroups, TokenRoute, divided, kept_lengths, token_plan
from st_fast.train.layouts import draw_layout

ORDINALS = torch.arange(4000) + 2**33


@pytest.mark.parametrize(
    ("tokens", "shares", "lengths"),
    [
        (256, (0.25, 0.75), (64, 192)),
        (16, (0.1, 0.9), (2, 14)),
        (10, (0.33, 0.33, 0.34), (3, 3, 4)),
        (7, (0.5, 0.5), (4, 3)),
    ],
)  # fmt: skip
def test_groups_are_whole_tokens_that_add_up(tokens, shares, lengths):
    assert divided(tokens, shares) == lengths
    assert sum(divided(tokens, shares)) == tokens


def test_a_route_keeps_the_same_share_of_each_group():
    plan = token_plan(256, TokenGroups((0.25, 0.75)), TokenRoute(2, 8, 0.75))
    assert plan is not None
    assert (plan.lengths, plan.kept) == ((64, 192), (16, 48))
    assert kept_lengths((16,), 0.3) == (11,)
    assert token_plan(256, None, None) is None


def test_every_token_is_as_often_in_a_group_and_kept():
    plan = token_plan(24, TokenGroups((0.25, 0.75)), TokenRoute(1, 2, 0.5))
    assert plan is not None
    layout = draw_layout(plan, (4, 6), 0, ORDINALS)
    assert torch.equal(layout.order.sort(dim=1).values, torch.arange(24).expand(4000, -1))
    for part, chance in ((layout.order[:, :6], 6 / 24), (layout.kept, 12 / 24)):
        counts = torch.bincount(part.flatten(), minlength=24) / 4000
        assert (counts - chance).abs().max() < 5 * (chance * (1 - chance) / 4000) ** 0.5


def test_a_samples_order_follows_from_its_ordinal_and_the_seed_alone():
    plan = token_plan(24, TokenGroups((0.25, 0.75), whole=0.3), None)
    assert plan is not None
    whole, some = (draw_layout(plan, (4, 6), 5, ordinals) for ordinals in (ORDINALS[:8], ORDINALS[3:5]))
    assert torch.equal(whole.order[3:5], some.order)
    assert whole.whole is not None and some.whole is not None
    assert torch.equal(whole.whole[3:5], some.whole)
    assert not torch.equal(whole.order, draw_layout(plan, (4, 6), 6, ORDINALS[:8]).order)
    many = draw_layout(plan, (4, 6), 5, ORDINALS).whole
    assert many is not None
    assert many.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_a_structured_route_keeps_any_one_token_of_each_square():
    plan = token_plan(24, None, TokenRoute(1, 2, 0.75, structured=True))
    assert plan is not None
    kept = draw_layout(plan, (4, 6), 0, ORDINALS).kept  # (B, 6)
    squares = (kept // 6 // 2) * 3 + (kept % 6) // 2
    assert torch.equal(squares.sort(dim=1).values, torch.arange(6).expand(4000, -1))
    counts = torch.bincount(kept.flatten(), minlength=24) / 4000
    assert (counts - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
