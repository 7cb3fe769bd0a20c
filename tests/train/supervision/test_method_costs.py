"""What each method costs, against PyTorch's own count of the operations it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from st_fast.model import build
from st_fast.model.layout import Layout, Route
from st_fast.recipe import cost
from st_fast.recipe.methods import (
    Dispersive,
    DualTime,
    LayerSync,
    Plain,
    Repa,
    SelfFlow,
    SelfRepresentation,
    Sra2,
    VelocityHead,
)
from st_fast.recipe.routing import Routing
from st_fast.recipe.schema import Model, Recipe, Stage
from st_fast.recipe.token_cost import grouped_bytes, grouped_macs
from st_fast.train.supervision import Parts, create
from tests.train.supervision.test_losses import TABLE

MODEL = Model("custom", depth=6, width=64, heads=2, patch=2, channels=4, latent_size=16, num_classes=5)
TOKENS = torch.zeros(1, 64, 64)


def cost_of(method) -> cost.StageCost:
    stage = Stage("s", method, 10)
    return cost.stage_cost(Recipe(MODEL, (stage,)), stage)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def heads_of(method, **parts):
    return create(Stage("s", method, 10), Parts(MODEL, TABLE, None, **parts), seed=1).heads


def test_layer_sync_costs_the_student_alone():
    assert cost_of(LayerSync(2, 4)) == cost_of(Plain())


def test_sras_teacher_runs_one_forward_to_its_block_for_every_sample():
    model = build(MODEL, TABLE, 0)
    x, one = torch.zeros(1, 4, 16, 16), torch.zeros(1)
    method = SelfRepresentation(2, 4)
    forward = counted(lambda: model.features(x, one, one.long(), 4))
    assert cost_of(method).teacher == pytest.approx(forward, rel=0.02)  # one more modulation is run than is defined
    heads = heads_of(method, average=object())
    assert cost_of(method).heads == 3 * counted(lambda: heads(TOKENS))
    assert cost_of(method).student == cost_of(Plain()).student


@pytest.mark.parametrize("separated", [False, True])
@pytest.mark.parametrize("teacher_time", ["sra", "self_flow"])
def test_groups_of_tokens_cost_a_modulation_each_and_attention_within_each_or_all(separated, teacher_time):
    method = DualTime(2, 4, groups=(0.2, 0.3, 0.5), separated=separated, teacher_time=teacher_time)
    model, x, one = build(MODEL, TABLE, 0), torch.zeros(1, 4, 16, 16), torch.zeros(1)
    layout, times = Layout(torch.arange(64)[None], (13, 19, 32), separated), torch.zeros(1, 3)
    assert cost_of(method).student == 3 * counted(lambda: model(x, times, one.long(), 0, layout))
    alike = teacher_time == "self_flow" and not separated
    seen = (x, one, one.long(), 4) if alike else (x, times, one.long(), 4, layout)
    assert cost_of(method).teacher == pytest.approx(counted(lambda: model.features(*seen)), rel=0.04)
    heads = heads_of(method, average=object())
    assert cost_of(method).heads == 3 * counted(lambda: heads(TOKENS))
    changed = cost_of(method).student - cost_of(Plain()).student
    apart = 6 * 6 * 2 * 64 * (13**2 + 19**2 + 32**2 - 64**2) if separated else 0  # blocks, trained, q·kᵀ and ·v, width
    vectors = 6 * 2 * (256 * 64 + 64 * 64 + 64 * (6 * 6 + 2) * 64)  # of two more groups
    assert changed == apart + vectors


def test_self_flow_costs_two_modulations_and_one_forward_of_the_whole_image_to_the_teachers_block():
    method, model = SelfFlow(student_depth=2, teacher_depth=4), build(MODEL, TABLE, 0)
    x, one, layout = torch.zeros(1, 4, 16, 16), torch.zeros(1), Layout(torch.arange(64)[None], (48, 16))
    assert cost_of(method).student == 3 * counted(lambda: model(x, torch.zeros(1, 2), one.long(), 0, layout))
    forward = counted(lambda: model.features(x, one, one.long(), 4))
    assert cost_of(method).teacher == pytest.approx(forward, rel=0.02)
    heads = heads_of(method, average=object())
    assert cost_of(method).heads == 3 * counted(lambda: heads(TOKENS))


@pytest.mark.parametrize("separated", [False, True])
def test_a_route_through_groups_costs_attention_among_what_it_keeps_of_each(separated):
    method = DualTime(1, 4, groups=(0.25, 0.75), separated=separated)
    routing = Routing(route="tread", route_rate=0.5, route_first=2, route_last=5)
    stage = Stage("s", method, 10, routing=routing)
    layout = Layout(torch.arange(64)[None], (16, 48), separated, route=Route(2, 5, (8, 24)))
    model, x = build(MODEL, TABLE, 0), torch.zeros(1, 4, 16, 16)
    forward = counted(lambda: model(x, torch.zeros(1, 2), torch.zeros(1).long(), 0, layout))
    assert cost.stage_cost(Recipe(MODEL, (stage,)), stage).student == 3 * forward


def test_a_sample_that_is_one_group_costs_attention_over_all_its_tokens():
    groups = [replace(DualTime(2, 4), full_sample_prob=chance).token_groups for chance in (0.0, 0.25, 1.0)]
    none, some, all_ = (grouped_macs(MODEL, one) for one in groups)
    assert none < some < all_ and some == pytest.approx(none + (all_ - none) / 4)
    assert all_ == grouped_macs(MODEL, replace(groups[0], separated=False))


def test_the_estimate_of_what_groups_keep_for_the_backward_pass():
    """Beside the trunk's: the second group's modulations, and separated attention's outputs where they are copies."""
    for method, copies in ((SelfFlow(student_depth=2, teacher_depth=4), 0), (DualTime(2, 4), 1)):
        extra = grouped_bytes(MODEL, method.token_groups, False)
        assert extra == 4 * 6 * (6 * 64 + copies * 64 * 64)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_repas_heads_cost_a_projection_to_each_encoders_width(projector):
    names = ("facebook/dinov2-small", "somewhere/dinov2-with-registers-large")
    method = Repa(names, 2, hidden=32, projector=projector)
    heads = heads_of(method, feature_widths=(384, 1024))
    assert cost_of(method).heads == 3 * counted(lambda: [head(TOKENS) for head in heads.projectors])
    assert cost_of(method).teacher == 0


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (VelocityHead(2, hidden=24), {}),
        (SelfRepresentation(2, 4), {"average": object()}),
        (DualTime(2, 4), {"average": object()}),
        (SelfFlow(student_depth=2, teacher_depth=4), {"average": object()}),
        (Repa(("dinov2-small", "dinov2-large"), 2, hidden=24), {"feature_widths": (384, 1024)}),
        (Repa(("dinov2-small", "dinov2-large"), 2, projector="conv"), {"feature_widths": (384, 1024)}),
        (LayerSync(2, 4), {}),
        (Dispersive(2), {}),
        (Sra2(2, hidden=24), {}),
    ],
)
def test_the_declared_layers_are_those_of_the_heads(method, parts):
    declared = {layer.name: (layer.outputs, layer.inputs) for layer in method.head_layers(MODEL)}
    found = heads_of(method, **parts).state_dict()
    assert {f"{name}.weight": shape for name, shape in declared.items()} == {
        key: tuple(tensor.flatten(1).shape) for key, tensor in found.items() if key.endswith("weight")
    }
    assert cost.head_parameters(MODEL, method) == sum(tensor.numel() for tensor in found.values())


def test_heads_cost_nothing_after_the_stop():
    stage = Stage("s", Repa(("dinov2-base",), 2, stop_step=4), 10)
    recipe = Recipe(MODEL, (stage,))
    always = Recipe(MODEL, (Stage("s", replace(stage.method, stop_step=0), 10),))
    whole, stopped = (cost.stage_flops(r, r.stages[0], 0, 10) for r in (always, recipe))
    assert whole - stopped == pytest.approx(6 * 256 * cost.stage_cost(recipe, stage).heads)
    assert cost.stage_flops(recipe, stage, 4, 6) == 2 * 256 * cost.stage_cost(recipe, stage).student
