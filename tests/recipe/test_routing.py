"""Routes: what their keys may say, how many tokens they keep, and what a step under one costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from st_fast.recipe import RecipeError, cost, load, to_toml
from st_fast.recipe.load import from_text
from st_fast.recipe.methods import DualTime, LayerSync, Plain, Repa, SelfTranscendence, VelocityHead
from st_fast.recipe.routing import Routing
from st_fast.recipe.schema import Model, Recipe, Stage
from st_fast.recipe.token_cost import left_out_macs
from st_fast.recipe.tokens import divided, kept_lengths

MODEL = Model("custom", depth=6, width=64, heads=2, patch=2, channels=4, latent_size=16, num_classes=5)
TREAD = 'supervision = "velocity_head"\nroute = "tread"'


def routed(spoil, keys: str, model: str = "") -> Recipe:
    path = spoil('supervision = "velocity_head"', f"{TREAD}\n{keys}")
    path.write_text(path.read_text().replace("depth = 6\n", f"depth = 6\n{model}\n") if model else path.read_text())
    return load(path)


def test_the_defaults_are_tread_as_published_for_b_and_for_deep_networks() -> None:
    """Their code counts from 0: tokens are left out before block 2 and come back behind block depth − 4."""
    for depth, last in ((12, 9), (28, 25)):
        route = Routing("tread").tokens(replace(MODEL, depth=depth))
        assert route is not None
        assert (route.first, route.last, route.rate, route.structured) == (2, last, 0.5, False)
    assert Routing().tokens(MODEL) is None and not Routing().runs(0)


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ("route_rate = 1.0", "route_rate", "above 0 and below 1"),
        ("route_rate = 0", "route_rate", "above 0 and below 1"),
        ("route_rate = 0.97", "route_rate", r"it keeps none of 16 tokens; allowed: a share that keeps some"),
        ("route_rate = 0.01", "route_rate", r"it keeps all of 16 tokens; allowed: a share that keeps some"),
        ("route_first = 6", "route_first", "0 to 5, with blocks"),
        ("route_last = 2", "route_last", r"= 2: with route_first = 2 and model.depth = 6; allowed: 3 to 6$"),
        ("route_last = 7", "route_last", "allowed: 3 to 6$"),
        ("route_first = 3", "route_last", r'"auto": block 3, with route_first = 3 .*; allowed: 4 to 6$'),
        ("route_first = 0\nroute_last = 6", "route_last", "allowed: 1 to 5, so that some block runs all tokens"),
        ('route_select = "structured"', "route_select", r'"auto"; allowed: "random", or route_rate = 0.75$'),
        ("dense_after = 101", "dense_after", "0 to 100, the stage's steps"),
        ('route = "thread"', "route", "did you mean tread"),
    ],
)
def test_a_route_that_does_not_fit_is_one_line(keys, key, words, spoil) -> None:
    text = keys if keys.startswith("route =") else f'route = "tread"\n{keys}'
    with pytest.raises(RecipeError, match=words) as caught:
        load(spoil('supervision = "velocity_head"', f'supervision = "velocity_head"\n{text}'))
    assert caught.value.key == f"stage.align.{key}" and "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["route_rate = 0.5", "route_first = 1", "route_last = 3", "dense_after = 4"])
def test_keys_of_a_route_without_one_are_refused(line, spoil) -> None:
    with pytest.raises(RecipeError, match="without a route no token is left out") as caught:
        load(spoil('supervision = "velocity_head"', f'supervision = "velocity_head"\n{line}'))
    assert caught.value.key == f"stage.align.{line.split()[0]}"


def test_one_block_has_no_route_and_odd_sides_have_no_squares(spoil) -> None:
    path = spoil('supervision = "velocity_head"\ndepth = 2', 'supervision = "none"\nroute = "tread"')
    path.write_text(path.read_text().split('[[stage]]\nname = "transcend"')[0])
    with pytest.raises(RecipeError, match=r'"tread": model.depth = 1, and some block must run all tokens; allowed: "n'):
        load(path, ["--model.depth=1"])
    structured = ['--stage.align.route_select="structured"', "--stage.align.route_rate=0.75"]
    assert load(path, structured).stages[0].routing.structured
    with pytest.raises(RecipeError, match="one token of each 2 x 2 is kept, and there are 5 x 5"):
        load(path, [*structured, "--model.latent_size=10"])


def test_a_recipe_with_a_route_is_read_as_it_was_written(spoil) -> None:
    recipe = routed(spoil, "route_rate = 0.25\nroute_first = 1\ndense_after = 60")
    assert recipe.stages[0].routing == Routing("tread", 0.25, 1, dense_after=60)
    assert from_text(to_toml(recipe), "here") == recipe


def test_a_changed_route_is_changed_mathematics(spoil) -> None:
    from st_fast.recipe.check import changed_maths

    old, new = (routed(spoil, f"dense_after = {steps}") for steps in (60, 70))
    assert changed_maths(old, new) == ["stage.align.dense_after: 60 → 70"]


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"), [(256, 0.5, 128), (256, 0.75, 64), (16, 0.9, 2), (35, 0.5, 18), (49, 0.3, 34)]
)
def test_counts_of_kept_tokens_are_exact(tokens, rate, kept) -> None:
    assert kept_lengths((tokens,), rate) == (kept,)


def test_groups_are_whole_and_add_up_and_each_keeps_its_share() -> None:
    for tokens in (16, 35, 256, 1023):
        for shares in ((0.25, 0.75), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7), (1.0,)):
            lengths = divided(tokens, shares)
            assert sum(lengths) == tokens
            assert all(abs(n - tokens * share) < 1 for n, share in zip(lengths, shares, strict=True))
            assert all(abs(k - n / 2) <= 0.5 for k, n in zip(kept_lengths(lengths, 0.5), lengths, strict=True))


def flops(routing: Routing, method=Plain(), steps: int = 10, first: int = 0, last: int = 10) -> float:  # noqa: B008
    stage = Stage("s", method, steps, routing=routing)
    return cost.stage_flops(Recipe(MODEL, (stage,)), stage, first, last)


def test_a_routes_blocks_cost_what_they_run_and_after_its_end_all_of_it() -> None:
    """Written out: of blocks 3 to 5 linear layers and attention run on 16 of 64 tokens, and adaLN as ever."""
    d, n, k = 64, 64, 16
    saved = 3 * (12 * d * d * (n - k) + 2 * d * (n * n - k * k))
    plain, tread = flops(Routing()), flops(Routing("tread", 0.75, route_first=2, route_last=5))
    assert plain - tread == pytest.approx(10 * 256 * 6 * saved, rel=1e-12)
    until = Routing("tread", 0.75, route_first=2, route_last=5, dense_after=4)
    assert plain - flops(until) == pytest.approx(4 * 256 * 6 * saved, rel=1e-12)
    pieces = [flops(until, first=a, last=b) for a, b in ((0, 3), (3, 6), (6, 10))]
    assert sum(pieces) == pytest.approx(flops(until), rel=1e-12)
    assert pieces[2] == pytest.approx(0.4 * plain, rel=1e-12)


@pytest.mark.parametrize(("depth", "share"), [(2, 1.0), (3, 0.25), (5, 0.25), (6, 1.0)])
def test_heads_cost_the_tokens_that_they_see(depth, share) -> None:
    method = VelocityHead(depth, hidden=24)
    stage = Stage("s", method, 10, routing=Routing("tread", 0.75, route_first=2, route_last=5, dense_after=6))
    found = cost.stage_cost(Recipe(MODEL, (stage,)), stage)
    whole = cost.stage_cost(Recipe(MODEL, (stage,)), Stage("s", method, 10)).heads
    assert found.heads == pytest.approx(share * whole) and found.heads + found.dense_heads == pytest.approx(whole)
    assert flops(stage.routing, method, first=6) == pytest.approx(flops(Routing(), method, first=6), rel=1e-12)


def test_a_route_saves_attention_within_groups_but_in_samples_that_are_one() -> None:
    def saved(chance: float, separated: bool = True) -> int:
        method = DualTime(1, 6, separated=separated, full_sample_prob=chance)
        return left_out_macs(MODEL, Stage("s", method, 10, routing=Routing("tread", 0.75, route_first=2, route_last=5)))

    assert saved(1.0) == saved(0.0, separated=False) > saved(0.0)
    assert saved(0.25) == pytest.approx(0.75 * saved(0.0) + 0.25 * saved(1.0), rel=1e-12)


def test_a_route_saves_the_attention_between_its_tokens_and_a_captions() -> None:
    stage = Stage("s", Plain(), 10, routing=Routing("tread", 0.75, route_first=2, route_last=5))
    short, long = (
        left_out_macs(replace(MODEL, network="mmdit", text_width=8, text_length=length), stage) for length in (1, 11)
    )
    assert long - short == 3 * 2 * 64 * (2 * 10 * (64 - 16))


def test_heads_that_end_before_the_route_does_cost_the_tokens_that_they_saw() -> None:
    method = SelfTranscendence("./x", student_depth=3, teacher_depth=4, hidden=24, stop_step=3)
    routing = Routing("tread", 0.75, route_first=2, route_last=5, dense_after=6)
    stage = Stage("s", method, 10, routing=routing)
    each = cost.stage_cost(Recipe(MODEL, (stage,)), stage)
    supervised = flops(routing, method) - flops(routing)
    assert supervised == pytest.approx(3 * 256 * (each.heads + each.teacher), rel=1e-9)


def test_a_comparison_of_gradients_costs_what_the_route_leaves_of_it() -> None:
    """Forward blocks 3 to 5 and backward block 5, behind the tapped one, run on 16 of 64 tokens, as the heads do."""
    d, n, k = 64, 64, 16
    saved = 12 * d * d * (n - k) + 2 * d * (n * n - k * k)
    method = Repa(("one",), 4, hidden=24, stop_below=0.0)
    heads = 2 * (n - k) * (d * 24 + 24 * 24 + 24 * d)
    routed = Stage("s", method, 10, routing=Routing("tread", 0.75, route_first=2, route_last=5, dense_after=6))
    recipe = Recipe(MODEL, (routed,))
    dense = cost.comparison_flops(recipe, Stage("s", method, 10))
    assert dense - cost.comparison_flops(recipe, routed) == pytest.approx(256 * 2 * 4 * (4 * saved + heads), rel=1e-12)
    assert cost.comparison_flops(recipe, routed, step=6) == dense


def test_a_route_lowers_the_estimate_of_memory_unless_it_ends() -> None:
    def bytes_of(routing: Routing, method=LayerSync(2, 4)) -> int:  # noqa: B008
        return cost.memory_bytes(Recipe(MODEL, (Stage("s", method, 10, routing=routing),)), 1, False)[1]

    assert bytes_of(Routing("tread", route_last=5)) < 0.9 * bytes_of(Routing())
    assert bytes_of(Routing("tread", route_last=5, dense_after=9)) == bytes_of(Routing())


def test_the_shipped_recipe_is_as_published() -> None:
    (stage,) = load(Path(__file__).parents[2] / "recipes" / "sit_xl_tread.toml", ranks=8).stages
    route = stage.routing.tokens(replace(MODEL, depth=28))
    assert route is not None and (route.first, route.last, route.rate, route.structured) == (2, 25, 0.5, False)


SPRINT = Routing("sprint", route_first=1, route_last=5)


def test_sprints_defaults_are_the_published_ones_and_its_network_has_a_fusion() -> None:
    route = Routing("sprint").tokens(replace(MODEL, depth=28))
    assert route is not None
    assert (route.first, route.last, route.rate, route.structured) == (2, 26, 0.75, True)
    network = Routing("sprint").network(replace(MODEL, depth=28))
    assert (network.fusion_first, network.fusion_last) == (2, 26)
    assert network.parameters - replace(MODEL, depth=28).parameters == 2 * 64 * 64 + 64 + 64
    assert Routing("tread").network(MODEL) == MODEL and Routing("sprint").network(network) == network
    (stage,) = load(Path(__file__).parents[2] / "recipes" / "sit_xl_sprint.toml", ranks=8).stages
    assert stage.routing == Routing("sprint", 0.75, 2, 26, "structured", 0.1, 2_000_000)


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ("route_first = 0", "route_first", "allowed: 1 to 4, with blocks"),
        ("route_last = 6", "route_last", r"allowed: 3 to 5$"),
        ("path_drop = 1.0", "path_drop", r"in \[0, 1\)"),
        ("route_rate = 0.5", "route_select", r'"auto": one token of each 2 x 2 .* route_rate = 0.5; allowed: "random"'),
    ],
)
def test_a_fused_route_that_does_not_fit_is_one_line(keys, key, words, spoil) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        load(spoil('supervision = "velocity_head"', f'supervision = "velocity_head"\nroute = "sprint"\n{keys}'))
    assert caught.value.key == f"stage.align.{key}" and "\n" not in str(caught.value)


def test_what_belongs_to_a_fusion_is_refused_without_it_or_where_it_can_not_be(spoil) -> None:
    path = spoil('supervision = "velocity_head"', f"{TREAD}\npath_drop = 0.2")
    with pytest.raises(RecipeError, match=r'path_drop = 0.2: route = "tread": .* with route = "sprint"'):
        load(path)
    path = spoil('supervision = "velocity_head"', 'supervision = "velocity_head"\nroute = "sprint"')
    with pytest.raises(RecipeError, match=r"fusion_first = 1, model.fusion_last = 4; allowed"):
        load(path, ["--model.fusion_first=1", "--model.fusion_last=4", "--stage.transcend.teacher=./x"])
    text = ["--model.network=mmdit", "--model.text_width=8", "--model.text_length=3"]
    with pytest.raises(RecipeError, match=r'"sprint": model.network = "mmdit", whose text runs'):
        load(path, text)
    assert load(path, [*text, "--stage.align.route=tread"]).stages[0].routing.route == "tread"
    plain = spoil("batch_size = 96", "batch_size = 48")
    for first, last in ((0, 3), (3, 3), (2, 6)):
        with pytest.raises(RecipeError, match="allowed: 1 <= fusion_first < fusion_last < depth"):
            load(plain, [f"--model.fusion_first={first}", f"--model.fusion_last={last}"])


def test_a_head_that_needs_all_tokens_is_refused_within_a_route_only(spoil) -> None:
    conv = 'supervision = "repa"\nprojector = "conv"\nroute = "tread"\nroute_last = 5\ndepth = '
    base = spoil('supervision = "velocity_head"\ndepth = 2', conv + "2")
    alone = base.read_text().split('[[stage]]\nname = "transcend"')[0]
    for depth in (1, 2, 3, 5, 6):
        base.write_text(alone.replace(conv + "2", f"{conv}{depth}"))
        if depth in (3, 5):
            with pytest.raises(
                RecipeError, match=f'"repa" reads block {depth} on the whole grid, where .* a block up to 2 or ab'
            ):
                load(base)
        else:
            load(base)
    pairs = 'supervision = "dispersive"\nroute = "tread"\nroute_last = 5\ndepth = 4'
    base.write_text(alone.replace(conv + "2", pairs))
    with pytest.raises(RecipeError, match='"dispersive" reads block 4 on the whole grid'):
        load(base)
    head = 'supervision = "internal_guidance"\nroute = "tread"\nroute_last = 5\ndepth = 4'
    base.write_text(alone.replace(conv + "2", head))
    with pytest.raises(RecipeError, match="the internal head reads block 4 on"):
        load(base)


def test_a_fused_step_costs_what_torchs_counter_sees() -> None:
    """Forward and backward of blocks of 64 and 16 tokens; what is stated is what no gradient is needed for."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from st_fast import kernels
    from st_fast.model import SiT
    from st_fast.train.layouts import draw_layout
    from tests.recipe.test_cost import no_input_gradient

    for routing in (SPRINT, replace(SPRINT, path_drop=0.0, dense_after=1), Routing("tread", 0.75, 1, 5)):
        stage = Stage("s", Plain(), 10, routing=routing)
        recipe = Recipe(MODEL, (stage,))
        model = recipe.for_stage(stage).model
        network = SiT(model, kernels.select({}, torch.device("cpu")))
        each = cost.stage_cost(recipe, stage)
        for step, flops in ((0, each.student), (1, each.student + each.dense_student * (routing.dense_after == 1))):
            plan = routing.plan(model, None, model.grid, step)
            layout = None if plan is None else draw_layout(plan, model.grid, 0, torch.arange(2))
            inputs = torch.zeros(2, 4, 16, 16), torch.full((2,), 0.5), torch.tensor([0, 1])
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                network(*inputs, layout=layout)[0].square().sum().backward()
            # The mask token's part of the fusion is one product a pass, and its gradients.
            mask = 6 * 64 * 64 if layout is not None and layout.route is not None and model.fusion_last else 0
            assert counter.get_total_flops() == pytest.approx(2 * (flops - no_input_gradient(model)) + mask, abs=1)
