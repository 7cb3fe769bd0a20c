"""Verdicts on the paper's claims follow from the stated rules, and the page says what they and the figures say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.evaluate.probe.__main__ import main
from st_fast.evaluate.probe.claims import Claim, Evidence, decide
from st_fast.evaluate.probe.examine import Findings
from st_fast.evaluate.probe.guided import MEASURES, Guidance, Guide
from st_fast.evaluate.probe.measures import Estimate
from st_fast.evaluate.probe.page import HEADER, check_page, table
from st_fast.evaluate.probe.subjects import Subject, told_apart, with_teachers
from st_fast.recipe import load
from st_fast.recipe.methods import Plain, SelfTranscendence, VelocityHead
from st_fast.recipe.schema import Stage
from st_fast.train.run import run
from tests import pixels

BLOCKS = [0, 1, 2, 3, 4]


def estimate(value: float, error: float = 0.01) -> Estimate:
    """An independent one: 100 images that alternate give this standard error."""
    rng = np.random.default_rng(int(1e6 * value) % 2**31)
    parts = rng.permutation(np.tile([1.0, -1.0], 50)) * error * np.sqrt(99)
    return Estimate(value, parts)


def subject(method, step: int = 100, run_: str = "run", **more) -> Subject:
    model = SimpleNamespace(config=SimpleNamespace(depth=4, internal_head=0))
    stage = Stage("stage", method, step)
    return Subject(f"{run_}/{step}", stage, model, None, {"step": step}, None, Path(run_), **more)


def findings(accuracy: list[float], clean: list[float] | None = None) -> Findings:
    rows = [[[estimate(value) for value in one]] for one in (accuracy, clean or [0.5] * 5, [0.5] * 5)]
    return Findings(list(BLOCKS), *rows, [], [])


def verdicts(models, guides=()) -> dict[str, Claim]:
    return {claim.claim: claim for claim in decide(Evidence(models, guides, 0, 0.5))}


def one(found: dict[str, Claim], words: str) -> Claim:
    (claim,) = (claim for text, claim in found.items() if words in text)
    return claim


PLAIN = subject(Plain(), run_="plain"), findings([0.1, 0.2, 0.3, 0.5, 0.6], [0.3, 0.4, 0.5, 0.5, 0.5])
STAGE_2 = SelfTranscendence(teacher="t", student_depth=2, teacher_depth=3, cfg_scale=5.0)


def test_with_nothing_to_compare_nothing_is_tested() -> None:
    found = verdicts([(subject(VelocityHead(depth=1)), findings([0.1] * 5))])
    assert {claim.verdict for claim in found.values()} == {"not tested", "not testable at this size"}
    assert sum(claim.verdict == "not testable at this size" for claim in found.values()) == 3
    assert all(claim.found for claim in found.values())


def test_a_deep_plain_model_alone_is_looked_at_where_its_blocks_were_probed() -> None:
    deep = subject(Plain())
    deep.model.config.depth = 28
    accuracy = [[estimate(value) for value in (0.1, 0.2, 0.3, 0.6)]]
    found = Findings([0, 5, 20, 28], accuracy, accuracy, accuracy, [], [])
    claim = one(verdicts([(deep, found)]), "less discriminative than deeper")
    assert claim.verdict == "seen here" and "block 20 30.0 %, block 5 20.0 %" in claim.found


@pytest.mark.parametrize(("value", "verdict"), [(0.34, "seen here"), (0.31, "not seen"), (0.26, "not seen")])
def test_a_difference_counts_from_two_of_its_own_standard_errors(value: float, verdict: str) -> None:
    student = subject(STAGE_2, run_="student"), findings([0.1, 0.2, value, 0.5, 0.6])
    claim = one(verdicts([PLAIN, student]), "student's shallow features more discriminative")
    assert claim.verdict == verdict
    difference = estimate(value).over(estimate(0.3))
    assert f"block 2: {100 * value:.1f} %, plain 30.0 %" in claim.found
    assert f"{100 * difference.value:+.1f} ± {100 * difference.error:.1f} points" in claim.found


def test_where_some_of_several_show_it_that_is_said() -> None:
    students = [(subject(STAGE_2, run_=name), findings([0.1, 0.2, value, 0.5, 0.6])) for name, value in
                (("a", 0.5), ("b", 0.1))]  # fmt: skip
    claim = one(verdicts([PLAIN, *students]), "student's shallow features more discriminative")
    assert claim.verdict == "seen in part" and "a/100" in claim.found and "b/100" in claim.found


def test_a_model_with_more_steps_than_the_plain_one_is_not_compared_with_it() -> None:
    words = "student's shallow features more discriminative"
    longer = subject(STAGE_2, 101, "a"), findings([0.1, 0.2, 0.9, 0.9, 0.9])
    claim = one(verdicts([PLAIN, longer]), words)
    assert claim.verdict == "not tested" and "a/101 has had 101 steps and the plain run 100" in claim.found
    shorter = subject(STAGE_2, 60, "b"), findings([0.1, 0.2, 0.9, 0.9, 0.9])
    claim = one(verdicts([PLAIN, longer, shorter]), words)
    assert claim.verdict == "seen here" and "plain 30.0 % after 60 and 100 steps, +60.0" in claim.found
    assert "a/101" not in claim.found


def test_stage_1_is_looked_at_where_its_head_reads_and_where_it_teaches() -> None:
    head = subject(VelocityHead(depth=1), run_="one"), findings([0.1, 0.2, 0.3, 0.4, 0.6], [0.3, 0.6, 0.5, 0.5, 0.5])
    student = subject(STAGE_2, run_="student"), findings([0.1] * 5)
    found = verdicts([PLAIN, head, student])
    assert one(found, "makes its features cleaner").verdict == "seen here"
    assert "block 1: 0.600, plain 0.400, +0.200" in one(found, "makes its features cleaner").found
    assert one(found, "more meaningful").verdict == "not seen" and "block 3" in one(found, "more meaningful").found
    shallow = one(found, "less discriminative than deeper")
    assert shallow.verdict == "seen here" and "block 3 50.0 %, block 2 30.0 %" in shallow.found


def test_late_learning_needs_several_steps_of_a_plain_run_and_compares_the_last_with_the_first() -> None:
    early = subject(Plain(), 10, "plain"), findings([0.1, 0.1, 0.1, 0.45, 0.5])
    between = subject(Plain(), 50, "plain"), findings([0.1] * 5)
    student = subject(STAGE_2, run_="student"), findings([0.1] * 5)
    text = "shallow ones slowly"
    assert one(verdicts([PLAIN, student]), text).verdict == "not tested"
    claim = one(verdicts([between, PLAIN, early, student]), text)
    assert claim.verdict == "seen here" and "steps 10 to 100: block 2 gains +20.0" in claim.found
    other = subject(Plain(), 10, "plain"), findings([0.1, 0.1, 0.25, 0.25, 0.5])
    assert one(verdicts([other, PLAIN, student]), text).verdict == "not seen"
    assert one(verdicts([early, PLAIN, student]), "less discriminative than deeper").found.startswith("plain/100")


def guided(**values: tuple[float, float, float]) -> Guidance:
    """Measures at ω 0, 1 and 5; 0.5 where none is given."""
    found = Guidance([0.0, 1.0, 5.0])
    for name in MEASURES:
        found.measures[name].append([estimate(value) for value in values.get(name, (0.5, 0.5, 0.5))])
    return found


@pytest.mark.parametrize(
    ("words", "values", "verdict"),
    [
        ("them more discriminative", {"between_pooled": (0.2, 0.4, 0.8)}, "seen here"),
        ("them more discriminative", {"between_pooled": (0.2, 0.8, 0.8)}, "not seen"),
        ("beyond the label", {"told_random": (0.3, 0.4, 0.5)}, "seen here"),
        ("beyond the label", {"told_random": (0.5, 0.4, 0.3)}, "not seen"),
        ("guided features are clean", {"steady": (0.2, 0.4, 0.8)}, "seen here"),
        ("guided features are clean", {"steady": (0.2, 0.4, 0.8), "clean": (0.6, 0.6, 0.3)}, "not seen"),
        ("guided features are clean", {"steady": (0.8, 0.6, 0.2)}, "not seen"),
    ],
)
def test_the_target_is_judged_at_the_students_own_scale(words, values, verdict) -> None:
    student = subject(STAGE_2, run_="student"), findings([0.1] * 5)
    guide = Guide("teacher", student[0].model, 3, {"student": 5.0}, {})
    assert one(verdicts([student], [(guide, guided(**values))]), words).verdict == verdict
    idle = Guide("teacher", student[0].model, 3, {}, {})
    assert one(verdicts([student], [(idle, guided(**values))]), words).verdict == "not tested"


def test_what_no_image_can_tell_is_not_tested() -> None:
    student = subject(STAGE_2, run_="student"), findings([0.1] * 5)
    guide = Guide("teacher", student[0].model, 3, {"student": 5.0}, {})
    found = guided()
    found.measures["between_pooled"] = [[Estimate(np.nan, np.full(9, np.nan))] * 3]
    claim = one(verdicts([student], [(guide, found)]), "them more discriminative")
    assert (claim.verdict, claim.found) == ("not tested", "needs more held-out images than classes")


def test_deep_and_shallow_models_are_compared_at_blocks_that_were_looked_at() -> None:
    text = "less discriminative than deeper"
    deep = subject(Plain()), findings([0.1, 0.2, 0.3, 0.5, 0.6])
    deep[0].model.config.depth = 14
    deep[1].blocks[:] = [0, 4, 9, 10, 14]  # of a deep model not every block is looked at
    assert one(verdicts([deep]), text).found.startswith("run/100: block 9 30.0 %, block 4 20.0 %")
    two = subject(Plain(), run_="two"), findings([0.1, 0.2, 0.3, 0.5, 0.6])
    two[1].blocks[:] = [0, 1, 2]
    student = subject(STAGE_2, run_="student"), findings([0.1] * 5)
    assert one(verdicts([two, student]), text).verdict == "not tested", "it has no block 3"


def test_labels_differ_and_teachers_keep_theirs() -> None:
    pair = [subject(Plain(), step) for step in (1, 2)]
    same = [Subject("a", one.stage, one.model, None, one.loaded, None, one.run) for one in pair]
    assert [one.label for one in told_apart(same)] == ["a, step 1", "a, step 2"]
    twins = [Subject("a", one.stage, one.model, None, {"step": 3}, None, Path(name)) for one, name in
             zip(pair, ("x/a", "y/a"), strict=True)]  # fmt: skip
    assert [one.label for one in told_apart(twins)] == ["x/a · a, step 3", "y/a · a, step 3"]
    teacher = Subject("t", Stage("align", Plain(), 1), None, None, {}, None, Path("x"))
    student = Subject("s", Stage("go", SelfTranscendence(teacher="align"), 1), None, None, {}, None, Path("x"))
    assert [one.teacher for one in with_teachers([teacher, student])] == [None, "t"]
    elsewhere = Subject("s", student.stage, None, None, {}, None, Path("y"))
    assert with_teachers([teacher, elsewhere])[1].teacher is None


def test_a_tables_cells_cannot_end_it() -> None:
    assert table(["a", "b"], [["x|y", "z\n|w"]]).splitlines()[2].count("|") == 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    data = pixels.write_data(folder / "data")
    whole = pixels.RECIPE.format(data=data)
    plain = whole[: whole.index("[[stage]]")] + '[[stage]]\nname = "plain"\nsupervision = "none"\nsteps = 8\n'
    for name, text in (("both", whole), ("plain", plain)):
        (folder / f"{name}.toml").write_text(text)
        run(load(folder / f"{name}.toml", [f"--run.out={folder / name}"]))
    return [folder / "both", folder / "plain"]


def test_the_page_tells_what_was_found_and_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    both, plain = runs
    early = plain / "plain" / "checkpoints" / "00000004"
    page = tmp_path / "docs" / "probes.md"
    page.parent.mkdir()
    main([str(plain), str(early), str(both), "--images", "80", "--times", "0.5", "0.6", "--write", str(page)])
    found = json.loads((page.parent / "probes" / "probe.json").read_text())
    text = page.read_text()
    assert [(m["label"], m["role"], m["step"]) for m in found["models"]] == [
        ("plain, step 8", "plain", 8), ("plain, step 4", "plain", 4), ("both · align", "stage 1", 8),
        ("both · transcend", "stage 2", 8),
    ]  # fmt: skip
    (guide,) = found["guided"]
    assert (guide["teacher"], guide["block"], guide["weights"]) == ("both · align", 2, "raw")
    assert guide["students"] == {"both · transcend": 3.0} and 3.0 in guide["scales"]
    assert guide["sha256"] != found["models"][2]["sha256"], "the student learnt from the raw weights"
    assert all(np.shape(one["value"]) == (2, len(guide["scales"])) for one in guide["measures"].values())
    assert not [claim for claim in found["claims"] if claim["verdict"] == "not tested"]
    for claim in found["claims"]:
        (row,) = (line for line in text.splitlines() if claim["claim"] in line)
        assert claim["found"] in row and row.endswith(f"| **{claim['verdict']}** |")
    assert (
        f"Of {len(found['claims'])} claims" in text
        and "at t = 0.5 (0 is the clean latent, 1 noise), on 40 held-out images" in text
    )
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 3 and all(min(Image.open(page.parent / name).size) > 200 for name in pictures)
    assert str(tmp_path) not in (page.parent / "probes" / "probe.json").read_text()
    assert "figures" not in found and (plain / "probe" / "knows.png").is_file()


def test_a_teacher_that_is_gone_leaves_its_target_out_and_says_so(runs, tmp_path, capsys) -> None:
    from shutil import copytree, rmtree

    both = copytree(runs[0], tmp_path / "both")
    rmtree(both / "align")
    main([str(both), "--images", "80", "--times", "0.5", "--write", str(tmp_path / "page.md")])
    assert "the features that transcend learnt from can't be measured" in capsys.readouterr().out
    found = json.loads((both / "probe" / "probe.json").read_text())
    assert found["guided"] == [] and "How clean" not in (tmp_path / "page.md").read_text()


def test_a_block_of_ones_own_choice_is_measured_in_every_model(runs, tmp_path) -> None:
    both, plain = runs
    how = ["--images", "80", "--times", "0.5", "--out", str(tmp_path / "out")]
    main([str(both), str(plain), *how, "--block", "3"])
    found = json.loads((tmp_path / "out" / "probe.json").read_text())["guided"]
    assert [(one["teacher"], one["block"]) for one in found] == [
        ("both · align", 3), ("both · transcend", 3), ("plain", 3),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--block 4: both · align has blocks 1 to 3"):
        main([str(both), str(plain), *how, "--block", "4"])


def test_a_page_that_is_no_probes_is_not_overwritten(tmp_path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Something else\n")
    with pytest.raises(UserError, match=r"README\.md"):
        check_page(page)
    assert page.read_text() == "# Something else\n"
    page.write_text(HEADER + "\n**Of 12 claims: …\n")
    check_page(page)
    check_page(tmp_path / "new.md")
    for wrong in (tmp_path, tmp_path / "page"):
        with pytest.raises(UserError, match="a Markdown file is needed"):
            check_page(wrong)
