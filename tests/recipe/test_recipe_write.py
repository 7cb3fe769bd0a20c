"""A resolved recipe survives being written and read."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from st_fast.recipe import Recipe, Stage, load, to_toml
from st_fast.recipe.methods import (
    METHODS,
    Dispersive,
    DualTime,
    LayerSync,
    Plain,
    Repa,
    SelfFlow,
    SelfRepresentation,
    SelfTranscendence,
    Sra2,
    VelocityHead,
)
from st_fast.recipe.routing import Routing
from st_fast.recipe.schema import SECTIONS, Contrast, Data, Evaluate, Flow, Kernels, Model, Optim, Run, Sample

INT = st.integers(1, 9_999)
ZERO_UP = st.integers(0, 9_999)
POSITIVE = st.floats(1e-6, 100.0)
NOT_NEGATIVE = st.just(0.0) | POSITIVE
FRACTION = st.just(0.0) | st.floats(1e-6, 0.999)
WINDOW = (
    st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)).filter(lambda w: w[0] != w[1]).map(lambda w: (min(w), max(w)))
)
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1)
NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,20}", fullmatch=True)
CHOICE = st.sampled_from(["auto", "fused", "reference"])
MASK = st.sampled_from(["sample", "sample_mean", "released"])


@st.composite
def models(draw: st.DrawFn) -> Model:
    heads, patch = draw(st.integers(1, 20)), draw(st.integers(1, 16))
    width = 4 * heads * draw(st.integers(1, 20))
    return Model(
        depth=draw(st.integers(1, 99)),
        width=width,
        heads=heads,
        patch=patch,
        channels=draw(INT),
        latent_size=patch * draw(st.integers(1, 64)),
        num_classes=draw(INT),
        class_dropout=draw(st.floats(1e-3, 0.999)),
        mlp_ratio=draw(st.floats(1 / width, 100.0)),
        qk_norm=draw(st.booleans()),
        attention=draw(TEXT),
    )


@st.composite
def routes(draw: st.DrawFn, depth: int, tokens: int, steps: int) -> Routing:
    if depth < 2 or tokens < 2 or draw(st.booleans()):
        return Routing()
    first = draw(st.integers(1, depth - 1))
    rate = draw(st.integers(1, tokens - 1)) / tokens
    return Routing("tread", rate, first, draw(st.integers(first + 1, depth)), dense_after=draw(st.integers(0, steps)))


@st.composite
def stages(draw: st.DrawFn, depth: int, tokens: int) -> tuple[Stage, ...]:
    names = draw(st.lists(NAME, min_size=1, max_size=4, unique_by=str.casefold))
    done: list[Stage] = []
    for name in names:
        steps, block = draw(INT), st.integers(1, depth)
        teachers = st.sampled_from([s.name for s in done]) if done else TEXT.map(lambda text: f"./{text}")
        align = st.builds(VelocityHead, block, st.sampled_from(["velocity", "latent"]), NOT_NEGATIVE, INT, WINDOW, MASK)
        transcend = st.builds(
            SelfTranscendence,
            teachers,
            st.sampled_from(["raw", "ema"]),
            block,
            block,
            NOT_NEGATIVE,
            st.sampled_from(["mse", "cosine", "normalized_mse"]),
            NOT_NEGATIVE,
            INT,
            WINDOW,
            MASK,
            st.integers(0, steps),
        )
        below = st.integers(1, max(depth - 1, 1))
        sync = st.builds(LayerSync, below, st.just(depth), NOT_NEGATIVE) if depth > 1 else st.just(Plain())
        names_of_encoders = st.lists(TEXT.filter(bool), min_size=1, max_size=3, unique=True).map(tuple)
        repa = st.builds(
            Repa,
            names_of_encoders,
            block,
            NOT_NEGATIVE,
            INT,
            st.booleans(),
            st.integers(0, steps),
            projector=st.sampled_from(["mlp", "conv"]),
            target_norm=FRACTION,
            stop_below=st.just("off") | st.floats(-1, 1).filter(lambda c: c == 0 or abs(c) > 1e-6),
            stop_every=INT,
        )
        sra = st.builds(
            SelfRepresentation,
            block,
            block,
            st.floats(1e-3, 1),
            st.sampled_from(["smooth_l1", "cosine"]),
            NOT_NEGATIVE,
            ZERO_UP,
            ZERO_UP,
        )
        sra2 = st.builds(Sra2, block, NOT_NEGATIVE, INT)
        halves = st.floats(0.2, 0.8)
        flow = st.builds(SelfFlow, halves, block, block, NOT_NEGATIVE)
        shares = halves.map(lambda share: (share, 1 - share))
        times = st.sampled_from(["sra", "self_flow", "same"])
        dual = st.builds(DualTime, block, block, shares, st.booleans(), FRACTION, times, FRACTION, NOT_NEGATIVE)
        spread = st.builds(Dispersive, block, NOT_NEGATIVE, POSITIVE)
        several = (flow, dual) if tokens >= 8 else ()  # each group has a token
        method = draw(st.one_of(st.just(Plain()), align, transcend, sync, repa, sra, sra2, spread, *several))
        contrast = st.just(Contrast()) | st.builds(Contrast, st.floats(1e-6, 0.999), st.booleans())
        route = draw(routes(depth, tokens, steps)) if isinstance(method, Plain) else Routing()
        done.append(Stage(name, method, steps, contrastive=draw(contrast), routing=route))
    return tuple(done)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    def section(kind: Any, **known: st.SearchStrategy[Any]) -> Any:
        return draw(st.builds(kind, **known))

    model = draw(models())
    trained = draw(stages(model.depth, model.tokens))
    pairs = any(stage.method.compares_samples for stage in trained)  # of a whole batch, which is one pass
    accumulation = 1 if pairs else draw(st.integers(1, 64))
    optim = dict(lr=POSITIVE, warmup_steps=ZERO_UP, betas=st.tuples(FRACTION, FRACTION), eps=POSITIVE)
    optim |= dict(weight_decay=NOT_NEGATIVE, grad_clip=NOT_NEGATIVE, ema_decay=FRACTION)
    optim |= dict(accumulation=st.just(accumulation), batch_size=st.integers(2, 2**16).map(lambda n: n * accumulation))
    return Recipe(
        model=model,
        stages=trained,
        flow=section(
            Flow,
            path=st.sampled_from(["linear", "cosine"]),
            time=st.sampled_from(["uniform", "lognormal", "stratified"]),
        ),
        data=section(
            Data,
            path=TEXT,
            source=st.sampled_from(["shards", "digits"]),
            loader=st.sampled_from(["auto", "resident", "dali", "torch"]),
            verify=st.booleans(),
        ),
        optim=section(Optim, **optim),
        run=section(Run, out=TEXT, seed=ZERO_UP, log_every=INT, save_every=INT, keep=INT, keep_every=ZERO_UP),
        sample=section(
            Sample,
            every=ZERO_UP,
            num=ZERO_UP,
            batch_size=INT,
            sampler=st.sampled_from(["euler", "heun", "sde"]),
            steps=INT,
            cfg_scale=NOT_NEGATIVE,
            cfg_range=WINDOW,
        ),
        evaluate=section(Evaluate, classifier=st.booleans(), every=ZERO_UP, num=st.integers(65, 9_999)),
        kernels=section(Kernels, norm_modulate=CHOICE, align=CHOICE, adamw_ema=CHOICE),
    )


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_any_valid_recipe_written_and_read_is_the_same_recipe(recipe: Recipe, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load(path) == recipe


def test_a_named_model_written_and_read_is_the_same_recipe(small: Path) -> None:
    text = small.read_text().replace('name = "custom"\ndepth = 6\nwidth = 64\nheads = 4\npatch = 2', 'name = "SiT-S/4"')
    small.write_text(text)
    recipe = load(small)
    written = small.with_name("written.toml")
    written.write_text(to_toml(recipe), encoding="utf-8")
    assert recipe.model.depth == 12
    assert load(written) == recipe


def test_every_value_is_in_the_text_as_another_reader_sees_it(small: Path) -> None:
    recipe = load(small)
    read = tomllib.loads(to_toml(recipe))
    listed = {name: asdict(getattr(recipe, name)) for name in SECTIONS}
    for section in listed.values():
        section.update({key: list(value) for key, value in section.items() if isinstance(value, tuple)})
    assert {name: read[name] for name in SECTIONS} == listed
    assert [stage["name"] for stage in read["stage"]] == ["align", "transcend"]
    assert read["stage"][1]["t_range"] == [0.4, 0.7]


def test_what_a_recipe_can_not_hold_is_not_written(small: Path) -> None:
    class Unregistered(Plain):
        pass

    assert Unregistered not in METHODS.values()
    recipe = load(small)
    with pytest.raises(KeyError, match="not in METHODS"):
        to_toml(Recipe(model=recipe.model, stages=(Stage("x", Unregistered(), 1),)))
    with pytest.raises(TypeError, match="None is a NoneType"):
        to_toml(Recipe(model=Model(name=None), stages=recipe.stages))  # type: ignore[arg-type]


def test_any_string_is_written_so_that_another_reader_sees_it(small: Path) -> None:
    text = 'quote " backslash \\ line\nend\ttab \x00\x7f é \U0001f600'
    recipe = Recipe(model=Model(attention=text), stages=load(small).stages)
    assert tomllib.loads(to_toml(recipe))["model"]["attention"] == text
