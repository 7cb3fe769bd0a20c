"""Which differences between two recipes stop a resume."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from st_fast.recipe import Recipe, Stage, changed_maths, load
from st_fast.recipe.architecture import Model, check_shapes, resolve_model
from st_fast.recipe.error import RecipeError
from st_fast.recipe.methods import Plain
from st_fast.recipe.schema import SECTIONS
from st_fast.report.fairness import doubtful

MATHS = {
    *(f"model.{key}" for key in ("depth", "width", "heads", "patch", "channels", "latent_size", "num_classes")),
    *(f"model.{key}" for key in ("network", "text_width", "text_length", "zero_init")),
    *(
        "model.class_dropout",
        "model.mlp_ratio",
        "model.mlp",
        "model.norm",
        "model.position",
        "model.qk_norm",
        "model.qkv_bias",
        "model.value_residual",
        "model.registers",
        "model.prediction",
        "model.internal_head",
        "model.fusion_first",
        "model.fusion_last",
        "model.own_blocks",
        "model.own_parameters",
        "flow.path",
        "flow.time",
        "flow.time_mean",
        "flow.time_std",
        "flow.shift",
        "data.source",
    ),
    *(f"optim.{key}" for key in ("batch_size", "lr", "warmup_steps", "betas", "eps", "weight_decay", "grad_clip")),
    *("optim.schedule", "optim.decay_steps", "optim.lr_end"),
    *(
        "optim.name",
        "optim.reduction",
        "optim.ema_decay",
        "optim.ema_warmup",
        "optim.ema_decays",
        "run.seed",
        "run.precision",
        "run.fp8",
    ),
    *("validate.share", "validate.split_seed"),
    *(f"optim.muon_{key}" for key in ("lr", "adjust", "momentum", "weight_decay", "split", "adaln", "precision")),
}
"""Written out by hand: a new key of the schema must be put on one side or the other."""

HARMLESS = {
    *("data.path", "data.images", "data.images_subset", "data.text"),  # the digest says whether it is the same data
    *(
        "model.name",
        "model.attention",
        "model.own_macs",
        "model.own_bytes",
        "data.loader",
        "data.verify",
        "data.vae",
        "optim.accumulation",
        "optim.implementation",
    ),
    "optim.micro_batch",
    *("model.modulation", "run.out", "run.device", "run.sharding", "run.shard_ranks", "run.shard_teacher"),
    *(f"run.{key}" for key in ("compile", "checkpointing", "log_every", "save_every", "keep", "keep_every")),
    *(f"run.{key}" for key in ("teacher_branches", "teacher_placement", "supervised_rows", "prefetch", "cuda_graphs")),
    *(f"validate.{key}" for key in ("every", "path", "num", "train", "bins", "weights", "batch_size", "patience")),
    "validate.min_delta",
    *("run.streams", "run.max_bad_steps", "run.spike_ratio", "run.spike_retries", "run.hang_timeout", "run.trackers"),
}

KEYS = [f"{section}.{f.name}" for section, kind in SECTIONS.items() for f in fields(kind)]


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(changed(item) for item in value) or ("wandb",)
    return value + "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_shown_if_it_changes_the_maths_and_only_then(small: Path, key: str) -> None:
    old = load(small)
    section, name = key.split(".")
    value = getattr(getattr(old, section), name)
    new = replace(old, **{section: replace(getattr(old, section), **{name: changed(value)})})
    assert key in MATHS | HARMLESS or section in ("sample", "evaluate", "kernels", "profile")
    assert [line.split(":")[0] for line in changed_maths(old, new)] == ([key] if key in MATHS else [])
    assert changed_maths(new, new) == []


def test_the_report_warns_of_the_same_keys_and_of_how_samples_were_drawn() -> None:
    warned = {key for key in KEYS if doubtful(key)}
    # Of the data the digest decides whether a run may go on; other text states are other conditions all the same.
    assert warned == MATHS | {"data.text"} | {key for key in KEYS if key.startswith(("sample.", "evaluate."))}


def test_a_change_is_shown_with_both_values(small: Path) -> None:
    new = load(small, ["--optim.lr=0.01", "--stage.align.t_range=[0.2, 0.7]", "--run.out=elsewhere"])
    assert changed_maths(load(small), new) == [
        "optim.lr: 0.001 → 0.01",
        "stage.align.t_range: [0.4, 0.7] → [0.2, 0.7]",
    ]


def test_another_start_is_shown(small: Path) -> None:
    new = load(small, ["--stage.align.init=./x.pt", "--stage.align.init_weights=state"])
    assert changed_maths(load(small), new) == [
        'stage.align.init: "" → "./x.pt"',
        'stage.align.init_weights: "ema" → "state"',
    ]


def with_stages(recipe: Recipe, *stages: Stage) -> Recipe:
    return replace(recipe, stages=stages)


def test_stages_may_change_their_length_and_be_added_at_the_end_only(small: Path) -> None:
    recipe = load(small)
    align, transcend = recipe.stages
    extra = Stage("again", Plain(), 10)
    assert changed_maths(recipe, with_stages(recipe, replace(align, steps=1), replace(transcend, steps=10**6))) == []
    assert changed_maths(recipe, with_stages(recipe, align, transcend, extra)) == []
    assert changed_maths(recipe, with_stages(recipe, align)) == ["stage.transcend: removed"]
    assert len(changed_maths(recipe, with_stages(recipe, extra, align, transcend))) == 2
    renamed = with_stages(recipe, replace(align, name="other"), transcend)
    assert changed_maths(recipe, renamed) == ["stage.align: its place is taken by stage.other"]


def test_the_length_of_a_stage_counts_where_a_schedule_of_learning_rates_spans_it(small: Path) -> None:
    recipe = load(small, ["--optim.schedule=cosine"])
    align, transcend = recipe.stages
    assert changed_maths(recipe, recipe) == []
    assert changed_maths(recipe, with_stages(recipe, align, replace(transcend, steps=300))) == [
        'stage.transcend.steps: 200 → 300, which optim.schedule = "cosine" spans'
    ]


def test_every_setting_of_a_method_counts(small: Path) -> None:
    recipe = load(small)
    for position, stage in enumerate(recipe.stages):
        for f in fields(stage.method):
            method = replace(stage.method, **{f.name: changed(getattr(stage.method, f.name))})
            stages = list(recipe.stages)
            stages[position] = replace(stage, method=method)
            lines = changed_maths(recipe, with_stages(recipe, *stages))
            assert [line.split(":")[0] for line in lines] == [f"stage.{stage.name}.{f.name}"]


def test_another_method_is_shown_by_its_name(small: Path) -> None:
    recipe = load(small)
    align, transcend = recipe.stages
    lines = changed_maths(recipe, with_stages(recipe, replace(align, method=Plain()), transcend))
    assert lines == ['stage.align.supervision: "velocity_head" → "none"']


def test_weights_of_one_network_fit_however_it_began_and_was_computed_and_those_of_another_are_told():
    for wrong in ("MMDiT-6/2x", "MMDiT-06/2", "xMMDiT-6/2"):
        with pytest.raises(RecipeError, match=r"model\.name"):
            resolve_model(Model(wrong, text_width=8, text_length=4))
    with pytest.raises(RecipeError, match=r"model\.width = 6: .*multiple of 4"):
        check_shapes(Model(depth=1, width=6, heads=2, patch=2))
    for key in ("text_width", "text_length"):
        with pytest.raises(RecipeError, match=rf"model\.{key} = 3: .*network = \"sit\""):
            check_shapes(replace(resolve_model(Model("SiT-S/2")), **{key: 3}))
    text, classes = (resolve_model(m) for m in (Model("MMDiT-6/2", text_width=8, text_length=4), Model("SiT-S/2")))
    free = {"name": "custom", "class_dropout": 0.3, "zero_init": False, "attention": "math", "modulation": "one"}
    for model, others in ((text, {"num_classes": 7}), (classes, {"text_width": 3, "text_length": 5})):
        assert model.differences(replace(model, **free, **others).architecture()) == []
        assert not {"zero_init", *others} & model.described().keys()
    found = text.differences(replace(text, text_length=5, qk_norm=False).architecture())
    assert found == ["text_length 5 (this recipe: 4)", "qk_norm False (this recipe: True)"]
    older = {key: value for key, value in classes.architecture().items() if key != "qk_norm"}
    assert classes.differences(older) == [], "what it lacks is the default"
    assert text.differences(classes.architecture())[-3:] == [
        "network sit (this recipe: mmdit)", "text_width 0 (this recipe: 8)", "text_length 0 (this recipe: 4)",
    ]  # fmt: skip
