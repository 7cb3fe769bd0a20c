"""FAULTS rows 1 to 9, each made in a real process: exit code 2, one line, no torch imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from st_fast.core.errors import UserError
from st_fast.recipe import RecipeError, Stage, load
from st_fast.recipe.check import check
from st_fast.recipe.methods import DualTime, SelfFlow
from st_fast.train.__main__ import parse

REPOSITORY = Path(__file__).parents[2]
RANKS = 8

COMMAND = f"""
import sys
from st_fast.core.command import run_command
from st_fast.recipe import load

def main(arguments):
    load(arguments[0], arguments[1:], ranks={RANKS})

try:
    run_command(main)
finally:
    print(sorted({{"torch", "numpy"}} & set(sys.modules)))
"""

RESUME = """
from st_fast.core.command import run_command
from st_fast.core.errors import UserError
from st_fast.recipe import changed_maths, load

def main(arguments):
    changes = changed_maths(load(arguments[0]), load(arguments[1]))
    if changes:
        raise UserError("; ".join(changes))

run_command(main)
"""


def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8", timeout=60)


FAULTS = {
    "1 misspelt key": ("lr = 1e-3", "lrr = 1e-3", ["optim.lrr is unknown", "did you mean lr?", "batch_size"]),
    "1 unknown section": ("[optim]", "[optimiser]", ["optimiser is unknown", "did you mean optim?"]),
    "1 key in the wrong section": ("lr = 1e-3", "seed = 1", ["optim.seed is unknown", "did you mean run.seed?"]),
    "1 misspelt setting of a stage": (
        "student_depth = 2",
        "student_dept = 2",
        ["stage.transcend.student_dept is unknown", "did you mean student_depth?"],
    ),
    "1 setting of another method": (
        "\ndepth = 2",
        "\nteacher_depth = 2",
        ["stage.align.teacher_depth is unknown", "self_transcendence"],
    ),
    "1 misspelt choice": (
        "[data]",
        "[flow]\npath = 'liner'\n[data]",
        ['flow.path = "liner"', '"linear", "cosine"', "did you mean linear?"],
    ),
    "1 misspelt method": (
        '"velocity_head"',
        '"velocityhead"',
        ['stage.align.supervision = "velocityhead"', "did you mean velocity_head?"],
    ),
    "1 misspelt model": ('"custom"', '"SiT-XL2"', ['model.name = "SiT-XL2"', "did you mean SiT-XL/2?"]),
    "2 syntax": ("lr = 1e-3", "lr 1e-3", ["small.toml:15:4: "]),
    "3 word for a number": ("lr = 1e-3", "lr = 'fast'", ['optim.lr = "fast"', "number above 0"]),
    "3 NaN": ("lr = 1e-3", "lr = nan", ["optim.lr = nan", "finite"]),
    "3 negative learning rate": ("lr = 1e-3", "lr = -0.1", ["optim.lr = -0.1", "above 0"]),
    "3 true for an integer": ("batch_size = 96", "batch_size = true", ["optim.batch_size = true", "an integer"]),
    "4 batch": ("batch_size = 96", "batch_size = 100", ["optim.batch_size = 100", "8 x 1 = 8", " 96, 104"]),
    "5 student too deep": ("student_depth = 2", "student_depth = 7", ["transcend.student_depth = 7", "1 to 6"]),
    "5 teacher at block 0": ("teacher_depth = 4", "teacher_depth = 0", ["transcend.teacher_depth = 0", "1 to 6"]),
    "6 reversed": ("\ndepth = 2", "\ndepth = 2\nt_range = [0.7, 0.4]", ["align.t_range = [0.7, 0.4]", "low < high"]),
    "6 beyond 1": ("\ndepth = 2", "\ndepth = 2\nt_range = [0.4, 1.5]", ["align.t_range = [0.4, 1.5]", "<= 1"]),
    "7 guidance": (
        "num_classes = 10",
        "num_classes = 10\nclass_dropout = 0.0",
        ["model.class_dropout = 0.0", "null class", "stage.transcend", "sample.cfg_scale = 1.9"],
    ),
    "9 latent and patch": (
        "latent_size = 8",
        "latent_size = 9",
        ["latent_size = 9", "patch 2", "channels 4", "width 64", "heads 4"],
    ),
    "9 width and heads": ("heads = 4", "heads = 5", ["model.width = 64", "latent_size 8", "patch 2", "heads 5"]),
    "9 width and positions": ("width = 64\nheads = 4", "width = 66\nheads = 6", ["model.width = 66", "multiple of 4"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_recipe_is_told_in_one_line_with_exit_code_2_and_without_torch(
    fault: str, spoil: Callable[[str, str], Path]
) -> None:
    old, new, told = FAULTS[fault]
    path = spoil(old, new)
    result = run(COMMAND, path)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"st_fast: {path}")
    assert [part for part in told if part not in lines[0]] == []
    assert result.stdout.strip() == "[]", "torch or numpy was imported to read a recipe"


def test_the_unspoilt_recipe_passes_the_same_command(small: Path) -> None:
    result = run(COMMAND, small)
    assert (result.returncode, result.stderr, result.stdout.strip()) == (0, "", "[]")


def test_debug_shows_the_traceback(spoil: Callable[[str, str], Path]) -> None:
    result = run(COMMAND, spoil("lr = 1e-3", "lr = 0"), "--debug")
    assert "Traceback" in result.stderr and "optim.lr = 0" in result.stderr


def test_row_8_resuming_with_changed_maths_shows_the_difference(small: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.toml"
    changed.write_text(small.read_text().replace("lr = 1e-3", "lr = 1e-2"), encoding="utf-8")
    result = run(RESUME, small, changed)
    assert result.returncode == 2
    assert result.stderr == "st_fast: optim.lr: 0.001 → 0.01\n"


def test_a_classifier_evaluation_with_too_few_samples_is_refused(small: Path) -> None:
    options = ["--evaluate.classifier=true", "--evaluate.num=64"]
    with pytest.raises(RecipeError, match=r"evaluate\.num = 64.*at least 65"):
        load(small, options)
    load(small, [options[0], "--evaluate.num=65"])


TEXT = ["--model.network=mmdit", "--model.text_width=6", "--model.text_length=4", "--evaluate.num=2049"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.text=clip"], r'data\.text = "clip": model\.network = "sit"'),
        (["--sample.prompts=['a fox']"], r"sample\.prompts = .*classes"),
        (["--evaluate.captions=data/val", "--evaluate.inception=w.pth", *TEXT[3:]], r'captions = "data/val".*classes'),
        ([*TEXT, "--evaluate.captions=data/val"], r"nothing is scored; allowed: left out, or evaluate\.inception"),
        ([*TEXT, "--evaluate.captions=data/val", "--evaluate.classifier=true"], r"evaluate\.classifier scores"),
    ],
)
def test_texts_that_nothing_would_read_are_refused(options: list[str], words: str, small: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        load(small, options)
    load(small, [*TEXT, "--evaluate.captions=data/val", "--evaluate.inception=w.pth", "--data.text=clip"])


def test_the_classifier_has_as_many_features_as_the_check_assumes() -> None:
    from st_fast.evaluate.classifier import FEATURES
    from st_fast.recipe.measures import CLASSIFIER_FEATURES

    assert CLASSIFIER_FEATURES == FEATURES


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[]", "at least one"),
        ('["a", "a"]', "none twice"),
        ('["a", ""]', "none empty"),
        ('"a"', "a list, each a string"),
        ("[1]", "a list, each a string"),
    ],
)
def test_encoders_are_a_list_of_distinct_names(value: str, words: str, spoil: Callable[[str, str], Path]) -> None:
    path = spoil('"velocity_head"', f'"repa"\nencoders = {value}')
    with pytest.raises(RecipeError) as refused:
        load(path)
    assert "stage.align.encoders" in str(refused.value) and words in str(refused.value)


def of_two_blocks(supervision: str, keys: str) -> str:
    """A stage's lines with these keys, in place of its own depths where they are named."""
    depths = {"student_depth": 1, "teacher_depth": 2}
    others = [f"{name} = {depth}" for name, depth in depths.items() if not keys.startswith(name)]
    return "\n".join([f'supervision = "{supervision}"', *others, keys])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("mask_ratio = 0.0", "mask_ratio = 0.0; allowed: a finite number in (0, 1)"),
        ("mask_ratio = 1.0", "in (0, 1)"),
        ("mask_ratio = 1e-4", "of 16 tokens they would be 16 and 0; allowed: shares that give each group a token"),
        ("teacher_depth = 29", "teacher_depth = 29; allowed: 1 to 6, the model's blocks"),
        ("student_depth = 0", "student_depth = 0; allowed: 1 to 6, the model's blocks"),
        ("weight = -1.0", "at least 0"),
    ],
)
def test_self_flows_keys_are_checked(keys: str, words: str, spoil: Callable[[str, str], Path]) -> None:
    path = spoil('supervision = "velocity_head"\ndepth = 2', of_two_blocks("self_flow", keys))
    with pytest.raises(RecipeError) as refused:
        load(path)
    assert "stage.align." in str(refused.value) and words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("groups = [1.0]", "with 2 to 16 above 0 that add up to 1"),
        ("groups = [0.5, 0.6]", "with 2 to 16 above 0 that add up to 1"),
        ("groups = [0.0, 1.0]", "with 2 to 16 above 0 that add up to 1"),
        ("groups = [0.001, 0.999]", "of 16 tokens they would be 0 and 16"),
        ("full_sample_prob = 1.5", "full_sample_prob = 1.5; allowed: a finite number in [0, 1]"),
        ("full_sample_prob = -0.1", "in [0, 1]"),
        ('teacher_time = "min"', '"sra", "self_flow", "same"'),
        ("time_offset = 2.0", "in [0, 1]"),
        ("teacher_depth = 40", "allowed: 1 to 6"),
    ],
)
def test_the_keys_of_dual_times_are_checked(keys: str, words: str, spoil: Callable[[str, str], Path]) -> None:
    path = spoil('supervision = "velocity_head"\ndepth = 2', of_two_blocks("sra_dual", keys))
    with pytest.raises(RecipeError) as refused:
        load(path)
    assert "stage.align." in str(refused.value) and words in str(refused.value) and "\n" not in str(refused.value)


def test_tokens_of_a_text_have_no_times_of_groups() -> None:
    recipe = load(Path(__file__).parents[2] / "recipes" / "mmdit_coco_repa.toml")
    for method in (SelfFlow(), DualTime()):
        with pytest.raises(RecipeError, match=r'supervision.*model.network = "mmdit": the tokens of a text'):
            check(replace(recipe, stages=(Stage("own", method, 10),)))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_block_cant_follow_itself_or_a_shallower_one(depth: int, spoil: Callable[[str, str], Path]) -> None:
    old = 'supervision = "velocity_head"\ndepth = 2'
    path = spoil(old, f'supervision = "layer_sync"\nstudent_depth = 2\nteacher_depth = {depth}')
    with pytest.raises(RecipeError, match=f"teacher_depth = {depth}; allowed: a block above student_depth = 2"):
        load(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["r.toml", "--optim.lr", "1e-4"], "write --optim.lr=1e-4, with ="),
        (["--stage.align.steps", "3", "r.toml", "--dry-run"], "write --stage.align.steps=3, with ="),
        (["r.toml", "--optim.lr", "-1"], "write --optim.lr=-1, with ="),
        (["r.toml", "s.toml"], "expected one recipe, got 2: r.toml s.toml"),
        ([], "expected one recipe, got 0: none"),
    ],
)
def test_an_override_without_an_equals_sign_is_told_how_to_write_it(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert str(error.value).endswith(words) or words in str(error.value)
