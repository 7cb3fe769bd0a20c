"""Reading, overriding, resolving and checking a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from st_fast.recipe import RecipeError, load, load_run, to_toml
from st_fast.recipe.check import splits_near
from st_fast.recipe.keys import describe, keys, typed_value
from st_fast.recipe.methods import METHODS, Plain, SelfTranscendence, VelocityHead
from st_fast.recipe.routing import Routing
from st_fast.recipe.schema import SECTIONS, Stage
from st_fast.recipe.sizes import SIZES

Spoil = Callable[[str, str], Path]


def refusal(path: Path | str, *overrides: str, ranks: int = 1) -> RecipeError:
    """The error that loading raises; its text must be one line."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides, ranks)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_values_become_typed_and_the_rest_keeps_its_defaults(small: Path) -> None:
    recipe = load(small)
    assert (recipe.model.depth, recipe.model.width, recipe.model.channels) == (6, 64, 4)
    assert recipe.optim.lr == 1e-3 and recipe.optim.betas == (0.9, 0.999)
    assert recipe.stage("align").method == VelocityHead(depth=2)
    assert recipe.stage("transcend").method == SelfTranscendence(teacher="align", student_depth=2, teacher_depth=4)
    assert [stage.steps for stage in recipe.stages] == [100, 200]


def test_an_integer_serves_where_a_number_is_wanted(small: Path) -> None:
    weight_decay = load(small, ["--optim.weight_decay=1"]).optim.weight_decay
    assert weight_decay == 1.0 and isinstance(weight_decay, float)


def test_the_folder_of_the_run_follows_the_file(small: Path) -> None:
    assert load(small).run.out == "runs/small"
    assert load(small, ["--run.out=elsewhere/x"]).run.out == "elsewhere/x"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_published_name_fills_in_the_sizes(spoil: Spoil, size: str, patch: int) -> None:
    path = spoil('name = "custom"\ndepth = 6\nwidth = 64\nheads = 4\npatch = 2', f'name = "SiT-{size}/{patch}"')
    model = load(path).model
    assert (model.depth, model.width, model.heads, model.patch) == (*SIZES[size], patch)


def test_sizes_beside_a_published_name_must_agree_with_it(small: Path, spoil: Spoil) -> None:
    path = spoil('name = "custom"\ndepth = 6\nwidth = 64\nheads = 4\npatch = 2', 'name = "SiT-B/2"\ndepth = 12')
    assert load(path).model.depth == 12
    error = refusal(path, "--model.depth=13")
    assert error.key == "model.depth" and error.value == 13 and "12" in error.allowed


@pytest.mark.parametrize("key", ["depth", "width", "heads", "patch"])
def test_a_custom_model_needs_every_size(small: Path, key: str) -> None:
    assert refusal(small, f"--model.{key}=0").key == f"model.{key}"


def test_overrides_reach_sections_and_stages_and_the_last_one_wins(small: Path) -> None:
    overrides = [
        "--optim.lr=1e-5",
        "--optim.lr=2e-4",
        "--sample.num=1_000",
        "--run.precision=bf16",
        "--data.path=/data/a-b c",
        "--run.out=2025-01-01",
        "--data.verify=false",
        "--stage.align.t_range=[0.1, 0.9]",
        '--stage.align.target="latent"',
        "--stage.transcend.steps=7",
    ]
    recipe = load(small, overrides)
    assert recipe.optim.lr == 2e-4 and recipe.sample.num == 1000 and recipe.data.verify is False
    assert (recipe.run.precision, recipe.data.path, recipe.run.out) == ("bf16", "/data/a-b c", "2025-01-01")
    assert recipe.stage("align").method == VelocityHead(depth=2, t_range=(0.1, 0.9), target="latent")
    assert recipe.stage("transcend").steps == 7


def test_keys_of_older_recipes_are_read_in_files_and_overrides(small: Path) -> None:
    small.write_text(small.read_text() + '\n[evaluate]\njudge = "classifier"\n')
    assert load(small).evaluate.classifier is True
    assert load(small, ["--evaluate.judge=none"]).evaluate.classifier is False
    assert load(small, ["--evaluate.classifier=false"]).evaluate.classifier is False
    assert load(small, ["--evaluate.classifier=false", "--evaluate.judge=classifier"]).evaluate.classifier is True
    twice = small.with_name("twice.toml")
    twice.write_text(small.read_text() + "classifier = false\n")
    assert "the older name of classifier, is given as well" in str(refusal(twice))
    error = refusal(small, "--evaluate.judge=cat")
    assert (
        error.key == "evaluate.classifier" and "true or false" in error.allowed and "--evaluate.judge=cat" in str(error)
    )


def test_a_value_can_not_smuggle_in_other_keys(small: Path) -> None:
    error = refusal(small, "--run.out=1\n[optim]\nlr = 5")
    assert error.key == "run.out" and "line breaks" in error.allowed


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--optim.lr=0", "--optim.lr=0: optim.lr = 0"),
        ("--optim.lrr=1", "did you mean lr?"),
        ("--optm.lr=1", "did you mean optim?"),
        ("--stage.alig.steps=1", "did you mean align?"),
        ("--stage.align.dept=1", "did you mean depth?"),
        ("--optim.lr", "--section.key=value"),
        ("optim.lr=1", "--section.key=value"),
        ("--lr=1", "--section.key=value"),
        ("--stage.steps=1", "--stage.<name>.<key>=value"),
        ("--optim.betas=[0.9", "is not a TOML value"),
        ("--data.path=\udcff", "broken Unicode"),
        ("--optim.batch_size=1e400", "optim.batch_size = inf"),
    ],
)
def test_a_wrong_override_is_named(small: Path, override: str, told: str) -> None:
    assert told in str(refusal(small, override))


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("--optim.lr=true", "number above 0"),
        ("--optim.lr=inf", "finite"),
        ("--optim.lr=-inf", "finite"),
        ("--optim.eps=0", "above 0"),
        ("--optim.betas=[0.9]", "a list of 2"),
        ("--optim.betas=0.9", "a list of 2"),
        ("--optim.betas=[0.9, 1.0]", "in [0, 1)"),
        ("--optim.betas=[-0.1, 0.9]", "in [0, 1)"),
        ("--optim.ema_decay=1", "in [0, 1)"),
        ("--optim.weight_decay=-1", "at least 0"),
        ("--optim.batch_size=0", "at least 1"),
        ("--optim.batch_size=2.0", "an integer"),
        ("--optim.accumulation=0", "at least 1"),
        ("--optim.micro_batch=-1", 'an integer at least 0 and at most 10^12, or "auto"'),
        ("--optim.micro_batch=8.0", 'an integer at least 0 and at most 10^12, or "auto"'),
        ("--optim.micro_batch=true", 'an integer at least 0 and at most 10^12, or "auto"'),
        ("--optim.micro_batch=atuo", "did you mean auto?"),
        ("--optim.batch_size=99999999999999999999", "64 bits"),
        ("--model.class_dropout=1", "in [0, 1)"),
        ("--model.class_dropout=-0.1", "in [0, 1)"),
        ("--model.qk_norm=yes", "true or false"),
        ("--model.qk_norm=1", "true or false"),
        ("--run.seed=-1", "at least 0"),
        ("--model.depth=1099511627776", "at most 10000"),
        ("--model.width=4294967296", "at most 262144"),
        ("--model.heads=1000000", "at most 65536"),
        ("--model.latent_size=1000000000", "at most 8192"),
        ("--model.channels=1000000000", "at most 65536"),
        ("--model.num_classes=1000000000000", "at most 10000000"),
        ("--model.mlp_ratio=1e308", "float32"),
        ("--model.mlp_ratio=1e30", "at most 1000"),
        ("--model.mlp_ratio=0.01", "1 / model.width"),
        ("--optim.lr=1e-300", "float32"),
        ("--optim.eps=1e300", "float32"),
        ("--optim.batch_size=1000000000000", "at most 10000000"),
        ("--optim.warmup_steps=1000000000000", "at most 10000000"),
        ("--run.log_every=1000000000", "at most 1000000"),
        ("--run.hang_timeout=1000000000000", "at most 100000000"),
        ("--sample.num=1000000000000", "at most 100000000"),
        ("--sample.batch_size=1000000000", "at most 1000000"),
        ("--sample.steps=1000000000", "at most 100000"),
        ("--sample.cfg_scale=1e30", "at most 1000000"),
        ("--evaluate.num=1000000000000", "at most 100000000"),
        ("--stage.align.hidden=1000000000", "at most 262144"),
        ("--stage.transcend.cfg_scale=1e30", "at most 1000000"),
        ("--stage.align.steps=4611686018427387904", "at most 10^12"),
        ("--run.out=7", "a string in quotes"),
        ("--run.out='   '", "that is not only blanks"),
        ("--data.path=' '", "that is not only blanks"),
        ("--data.path=['a']", "a string in quotes"),
        ("--sample.cfg_range=[0.5, 0.5]", "low < high"),
        ("--sample.cfg_range=[0.6, 0.5]", "low < high"),
        ("--sample.cfg_range=[-0.1, 0.5]", "0 <= low"),
        ("--sample.cfg_range=[0, nan]", "finite"),
        ("--stage.align.t_range=[0.4, 1.01]", "<= 1"),
        ("--stage.align.steps=0", "at least 1"),
        ("--stage.align.depth=7", "1 to 6"),
        ("--stage.transcend.stop_step=201", "0 to 200"),
        ("--stage.transcend.stop_step=-1", "0 to 200"),
        ("--stage.transcend.mask=samples", "did you mean sample?"),
    ],
)
def test_a_value_out_of_type_or_range_is_told_with_what_is_allowed(small: Path, override: str, allowed: str) -> None:
    error = refusal(small, override)
    assert error.key == override[2:].partition("=")[0]
    assert allowed in error.allowed


def test_every_whole_number_has_a_largest_value(small: Path) -> None:
    tables = {**SECTIONS, **{f"stage.{name}": cls for name, cls in METHODS.items()}, "stage": Stage, "route": Routing}
    whole = {
        f"{table}.{name}": key.kind
        for table, cls in tables.items()
        for name, key in keys(cls).items()
        if name not in ("method", "start", "contrastive", "routing")
        and "an integer" in (words := describe(key.kind))
        and "the stage's steps" not in words
        and "depth" not in words
    }
    assert {"run.save_every", "profile.steps", "stage.sra.decay_steps", "stage.steps", "route.route_last"} <= set(whole)
    del whole["run.seed"], whole["validate.split_seed"]  # any number of 64 bits is one
    for name, kind in whole.items():
        with pytest.raises(RecipeError, match=r"allowed: .*at most \d+") as caught:
            typed_value(name, kind, 2**63 - 1)
        assert len(str(caught.value)) < 300
    start = time.process_time()
    tried = ("optim.accumulation", "run.save_every", "run.keep", "run.log_every", "profile.steps", "stage.align.steps")
    for key in tried:
        assert refusal(small, f"--{key}={10**18}").key == key
        assert refusal(small, f"--{key}=0").key == key
    error = refusal(small, "--optim.batch_size=9600000", f"--stage.align.steps={10**12}")
    assert "more samples than 64-bit numbers count" in str(error) and error.allowed == "at most 480383960252"
    assert time.process_time() - start < 10


def test_a_model_of_more_parameters_than_can_be_is_refused_before_it_is_built(small: Path) -> None:
    error = refusal(small, "--model.depth=10000", "--model.width=65536")
    assert error.key == "model.width" and "depth 10000" in str(error) and "1e+12 parameters" in error.allowed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (".".join(["a"] * 200_000) + " = 1", "a line with 199999 dots"),
        ("[" + ".".join(["a"] * 200_000) + "]", "a line with 199999 dots"),
        ("x = {" + ".".join(["a"] * 200_000) + " = 1}", "a line with 199999 dots"),
        ('[[stage]]\nname="a"\n' * 1_001, "1001 stages; allowed: at most 1000"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "1" * 100_000, "digits"),
        ("#" * 2**20 + "\n", "larger than 1048576 bytes"),
    ],
)
def test_a_recipe_that_would_take_long_to_read_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    start = time.process_time()
    assert words in str(refusal(tmp_path / "r.toml"))
    assert time.process_time() - start < 10


def test_an_option_that_would_take_long_to_read_is_refused(small: Path) -> None:
    deep = "{" + ".".join(["a"] * 60_000) + "=1}"
    assert "not a TOML value" in str(refusal(small, f"--optim.lr={deep}"))
    assert load(small, ["--data.path=" + "a." * 200]).data.path == "a." * 200
    small.write_text(f"# {'.' * 200}\n" + small.read_text())
    assert load(small).optim.batch_size


def test_default_depths_are_checked_against_the_model_too(spoil: Spoil) -> None:
    error = refusal(spoil("student_depth = 2\n", ""))
    assert (error.key, error.value) == ("stage.transcend.student_depth", 8)


def test_the_batch_must_divide_and_the_suggestions_do(small: Path) -> None:
    assert load(small, ["--optim.accumulation=3"], ranks=8).optim.accumulation == 3
    error = refusal(small, "--optim.batch_size=250", "--optim.accumulation=3", ranks=8)
    assert "8 x 3 = 24" in str(error) and "240, 264" in error.allowed and "25" in error.allowed


def test_a_micro_batch_divides_a_ranks_share_and_the_suggestions_do(small: Path) -> None:
    options = ["--optim.batch_size=252", "--optim.micro_batch=28"]
    assert load(small, options, ranks=3).optim.micro_batch == 28
    error = refusal(small, *options, ranks=2)
    assert error.key == "optim.micro_batch" and "252 / 2 = 126" in str(error)
    assert "21" in error.allowed and "42" in error.allowed and "28" not in error.allowed
    assert refusal(small, "--optim.batch_size=252", "--optim.micro_batch=126", ranks=4).key == "optim.micro_batch"
    assert load(small, ["--optim.micro_batch=auto"], ranks=2).optim.micro_batch == "auto"


def test_accumulation_and_micro_batch_are_one_or_agree(small: Path) -> None:
    both = ["--optim.batch_size=96", "--optim.accumulation=4"]
    agreed = load(small, [*both, "--optim.micro_batch=12"], ranks=2)
    assert (agreed.optim.accumulation, agreed.optim.micro_batch) == (1, 12)
    small.write_text(to_toml(agreed))
    assert load(small) == agreed, "another number of ranks, as commands that look at a run have it, reads it too"
    for images in ("8", "24", "auto"):
        error = refusal(small, *both, f"--optim.micro_batch={images}", ranks=2)
        assert error.key == "optim.accumulation" and "optim.micro_batch = " in str(error) and "4" in str(error)


def test_what_needs_one_pass_a_step_is_told_of_a_micro_batch_too(small: Path) -> None:
    graphs = ["--optim.batch_size=96", "--run.cuda_graphs=true", "--run.supervised_rows=padded"]
    error = refusal(small, *graphs, "--optim.micro_batch=24", ranks=2)
    assert (error.key, error.value) == ("optim.micro_batch", 24) and "48" in error.allowed
    assert "run.cuda_graphs = true needs it" in str(error)
    assert load(small, [*graphs, "--optim.micro_batch=48"], ranks=2).run.cuda_graphs


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, []),
        (2, ["--optim.micro_batch=48", "--run.cuda_graphs=true", "--run.supervised_rows=padded"]),
        (3, ["--optim.accumulation=2"]),
        (3, ["--optim.micro_batch=8"]),
        (4, ["--optim.micro_batch=auto"]),
    ],
)
def test_the_recipe_of_a_run_is_read_back_however_many_ranks_it_was_for(ranks, options, small, tmp_path):
    recipe = load(small, ["--optim.batch_size=96", "--run.device=cuda", *options], ranks=ranks)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(recipe))
    assert load_run(tmp_path / "run") == recipe


@pytest.mark.parametrize(("batch_size", "parts"), [(250, 24), (1, 2), (7, 1000), (2**62, 48), (2**61 - 1, 3)])
def test_suggested_splits_are_near_and_even(batch_size: int, parts: int) -> None:
    sizes, splits = splits_near(batch_size, parts)
    assert sizes and splits and all(size > 0 and size % parts == 0 for size in sizes)
    assert min(abs(size - batch_size) for size in sizes) <= max(parts - batch_size, parts // 2)
    assert all(batch_size % split == 0 for split in splits)


def test_fewer_than_one_rank_is_the_callers_mistake(small: Path) -> None:
    with pytest.raises(ValueError, match="ranks = 0"):
        load(small, ranks=0)


def test_a_teacher_is_an_earlier_stage_or_a_path(small: Path) -> None:
    assert load(small, ["--stage.transcend.teacher=runs/a/align"]).stage("transcend").method.teacher_name
    assert "can't teach itself" in str(refusal(small, "--stage.transcend.teacher=transcend"))
    near = refusal(small, "--stage.transcend.teacher=aling")
    assert "did you mean align?" in str(near) and "(align)" in near.allowed
    assert "learns from a teacher" in str(refusal(small, "--stage.transcend.teacher="))


def test_a_teacher_can_not_be_a_later_stage(small: Path, recipe_text: str) -> None:
    head, align, transcend = recipe_text.split("[[stage]]")
    small.write_text("[[stage]]".join([head, transcend, align]))
    error = refusal(small)
    assert "comes later" in str(error) and "there is none" in error.allowed


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", "", "a b", "-x", "x.y", "a\\\\b", "x" * 65, "é", "a\\n"])
def test_a_stage_name_that_is_no_plain_folder_name_is_refused(spoil: Spoil, name: str) -> None:
    assert refusal(spoil('name = "align"', f'name = "{name}"')).key == "stage[1].name"


@pytest.mark.parametrize("name", ["transcend", "TRANSCEND"])
def test_two_stages_can_not_share_a_folder(spoil: Spoil, name: str) -> None:
    assert refusal(spoil('name = "align"', f'name = "{name}"')).problem.endswith("taken")


@pytest.mark.parametrize("line", ['name = "align"', 'supervision = "velocity_head"', "steps = 100"])
def test_a_stage_without_one_of_its_three_keys_is_refused(spoil: Spoil, line: str) -> None:
    assert refusal(spoil(line + "\n", "")).key == f"stage[1].{line.split()[0]}"


def test_a_recipe_needs_stages_as_an_array_of_tables(small: Path, recipe_text: str) -> None:
    head = recipe_text.split("[[stage]]")[0]
    for stages, told in [("", "no stage"), ("[stage]\nname = 'a'", "[[stage]]"), ("[[stage.a]]", "[[stage]]")]:
        small.write_text(head + stages)
        assert told in str(refusal(small))


def test_a_section_must_be_a_table(spoil: Spoil) -> None:
    assert "[optim]" in str(refusal(spoil("[optim]", "[[optim]]")))


def test_guidance_without_a_null_class_is_refused_until_nothing_wants_it(small: Path) -> None:
    plain = ["--model.class_dropout=0", "--sample.cfg_scale=1", "--stage.transcend.cfg_scale=1"]
    assert load(small, plain).model.class_dropout == 0
    for wanted in (1, 2):
        assert refusal(small, *(p for i, p in enumerate(plain) if i != wanted)).key == "model.class_dropout"


def test_a_stage_without_supervision_needs_nothing_else(spoil: Spoil) -> None:
    path = spoil('supervision = "velocity_head"\ndepth = 2', 'supervision = "none"')
    assert load(path).stage("align").method == Plain()


def test_shards_need_a_path(spoil: Spoil) -> None:
    assert refusal(spoil('path = "data/small"\n', "")).key == "data.path"


def test_a_file_that_can_not_be_a_recipe_is_named(small: Path, tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path / "none.toml"))
    assert "is a folder" in str(refusal(tmp_path))
    assert "can't be read" in str(refusal("a\0b.toml"))
    small.write_bytes(b"a = 1\nb = '\xff'\n")
    assert f"{small}:2:6: byte 0xff is not UTF-8" in str(refusal(small))
    small.write_bytes(b"#" * (1 << 20) + b"\n")
    assert "larger than" in str(refusal(small))


def test_a_device_without_end_is_not_read_to_its_end() -> None:
    assert "not a regular file" in str(refusal("/dev/zero"))


@pytest.mark.skipif(os.name != "posix", reason="needs file names with line breaks")
def test_even_a_hostile_file_name_is_told_in_one_line(tmp_path: Path) -> None:
    assert "a\\nb.toml" in str(refusal(tmp_path / "a\nb.toml"))


@pytest.mark.parametrize(
    ("text", "position"),
    [("a = ", "1:5"), ('[model]\nname = "x\n', "2:10"), ("x = 1\nx = 2", "2:"), ("\n\n  = 3", "3:3"), ("[[", "1:3")],
)
def test_a_syntax_error_has_line_and_column(small: Path, text: str, position: str) -> None:
    small.write_text(text)
    assert str(refusal(small)).startswith(f"{small}:{position}")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "a = " + "9" * 5_000, "a = 0x" + "f" * 100_000, '"a\\n\\u2028b" = 1', "a = 1e999"]
)
def test_hostile_values_are_refused_at_once(small: Path, text: str) -> None:
    small.write_text(text)
    start = time.process_time()
    assert len(str(refusal(small))) < 1_000
    assert time.process_time() - start < 1


def test_a_byte_order_mark_and_windows_line_ends_are_read(small: Path, recipe_text: str) -> None:
    expected = load(small)
    small.write_bytes(b"\xef\xbb\xbf" + recipe_text.replace("\n", "\r\n").encode())
    assert load(small) == expected


def test_a_long_value_is_shown_short_with_both_its_ends(small: Path) -> None:
    error = refusal(small, f"--flow.path=start{'x' * 10_000}end")
    assert "start" in str(error) and 'xend"' in str(error) and len(str(error)) < 500


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["decay_steps=5"], 'optim.decay_steps = 5: not read by optim.schedule = "constant"; allowed: 0, or'),
        (["schedule=cosine", "decay_steps=5"], 'optim.decay_steps = 5: not read by optim.schedule = "cosine"'),
        (["lr_end=0.5"], 'optim.lr_end = 0.5: not read by optim.schedule = "constant"; allowed: 0, or a schedule'),
        (["schedule=wsd"], 'optim.decay_steps = 0: optim.schedule = "wsd"; allowed: the steps of the decay'),
        (["schedule=wsd", "decay_steps=90", "warmup_steps=111"],
         'stage.align.steps = 100: optim.schedule = "wsd" with 111 steps of warm-up and 90 of decay; allowed: 201 to'),
        (["schedule=linear", "warmup_steps=100"], "with 100 steps of warm-up and at least 1 of decay; allowed: 101 to"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_is_one_line(small: Path, overrides: list[str], line: str) -> None:
    assert line in str(refusal(small, *(f"--optim.{override}" for override in overrides)))


def test_a_schedule_may_be_as_long_as_the_stage_and_the_count_and_a_stage_with_a_state_needs_no_warm_up(small) -> None:
    wsd = ["--optim.schedule=wsd", "--optim.decay_steps=40", "--optim.warmup_steps=60"]
    assert load(small, wsd).optim.decay_steps == 40
    state = ["--stage.align.init=./x", "--stage.align.init_weights=state", "--stage.align.steps=40"]
    load(small, wsd + state)
    assert "allowed: 100 to" in str(refusal(small, *wsd, *state[:1], *state[2:]))
    longest = ["--optim.schedule=linear", f"--stage.align.steps={2**24}"]
    load(small, longest)
    assert refusal(small, longest[0], f"--stage.align.steps={2**24 + 1}").key == "stage.align.steps"


def test_averages_of_one_decay_and_too_many_are_one_line(small: Path) -> None:
    assert load(small, ["--optim.ema_decays=[0.5, 0.999]"]).optim.ema_decays == (0.5, 0.999)
    error = refusal(small, "--optim.ema_decay=0.999", "--optim.ema_decays=[0.5, 0.999]")
    assert "optim.ema_decays = [0.5, 0.999]: optim.ema_decay = 0.999 is among them; allowed: " in str(error)
    for wrong in ("[0.5, 0.5]", "[0.1, 0.2, 0.3, 0.4, 0.5]"):
        assert "at most 4, none twice" in str(refusal(small, f"--optim.ema_decays={wrong}"))
    assert "in [0, 1)" in str(refusal(small, "--optim.ema_decays=[1.0]"))


def test_shifts_are_numbers_in_a_range_or_auto(small: Path) -> None:
    recipe = load(small, ["--flow.shift=auto", "--sample.shift=3", "--flow.time=logit_normal", "--flow.time_mean=-0.5"])
    assert (recipe.flow.shift, recipe.sample.shift, recipe.flow.time_mean) == ("auto", 3.0, -0.5)
    for key in ("flow.shift", "sample.shift"):
        for wrong in ("0", "0.009", "101", "inf", "true"):
            assert "at least 0.01 and at most 100" in refusal(small, f"--{key}={wrong}").allowed
    assert "at least 0.01" in str(refusal(small, "--flow.time_std=0"))
    error = refusal(small, "--flow.time_mean=0.5", "--flow.time=uniform")
    assert 'flow.time_mean = 0.5: not read by flow.time = "uniform"; allowed: 0, or time = "logit_normal"' in str(error)
    assert refusal(small, "--flow.time_std=0.5").key == "flow.time_std"
