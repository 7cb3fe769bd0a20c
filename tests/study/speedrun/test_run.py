"""Making records and tables: seeds trained, drawn, scored, and continued."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from st_fast.core.errors import RunFailed, UserError
from st_fast.core.lock import turn
from st_fast.study.speedrun import attempt, carry_out, record, rules, table, tried
from st_fast.study.speedrun.__main__ import main
from st_fast.study.speedrun.origin import Code
from st_fast.study.speedrun.prepare import read_images
from st_fast.study.speedrun.record import CLAIM, RECIPE, read_record
from st_fast.study.speedrun.score import Scorer
from st_fast.study.speedrun.task import read_task
from tests.study.speedrun.made import (
    DIFF,
    HEAD,
    changed_byte,
    in_this_process,
    silent,
    task_of,
)
from tests.tiny import ROOT


def test_a_score_is_that_of_the_samples_that_were_drawn(made: Path) -> None:
    """The distance again from its definition, by scipy's square root of a matrix and statistics of our own."""
    from scipy.linalg import sqrtm

    task, out = task_of(made), made / "runs" / "speedrun" / "tiny" / "1-mine" / "seed3"
    with np.load(out / "samples" / "samples.npz") as file:
        images, labels = file["arr_0"].transpose(0, 3, 1, 2), file["arr_1"]
    scorer = Scorer(task)
    ours = scorer.classifier.features(images).astype(np.float64)
    held_out, held_labels = read_images("digits", 32, "test", None)
    real = scorer.classifier.features(held_out).astype(np.float64)
    a, b = np.cov(ours.T), np.cov(real.T)
    expected = np.square(ours.mean(0) - real.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    told = attempt.read_attempt(out).result
    assert told.distance == pytest.approx(expected, rel=1e-6) and np.bincount(labels).tolist() == [10] * 10
    assert (scorer.classifier.predict(held_out) == held_labels).mean() == pytest.approx(task.accuracy)


def test_a_record_that_misses_the_target_is_none(made: Path, tmp_path: Path, monkeypatch) -> None:
    other = Path(shutil.copytree(made / "tiny", tmp_path / "tiny"))
    text = (other / "task.toml").read_text()
    (other / "task.toml").write_text(text.replace("target = 90.0", "target = 1.0"))
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed, match=r"no record: rec: not shown to be below 1 \(p = 1") as refusal:
        main(["run", "tiny", str(made / "mine.toml"), "--what", "x", "--out", "rec"])
    assert not (tmp_path / "rec").exists() and "runs/speedrun/tiny/rec" in str(refusal.value)


def test_code_that_scores_is_refused_before_training(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    diff = DIFF.format("st_fast/evaluate/metrics.py")
    monkeypatch.setattr(carry_out, "current_code", lambda: Code(HEAD, diff))
    with pytest.raises(UserError, match=r"its code changes st_fast/evaluate/metrics\.py, which scores"):
        main(["run", str(made / "tiny"), str(made / "mine.toml"), "--what", "x", "--out", "rec"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "held", "words"),
    [
        ("file/rec", "other", "cannot be opened for writing"),
        ("rec", "rec", "^rec: another run is writing here"),
        ("there/rec", "runs/speedrun/tiny/rec", "runs/speedrun/tiny/rec: another run is writing here"),
    ],
)
def test_a_place_where_no_record_can_be_written_is_told_before_training(
    place: str, held: str, words: str, made: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(carry_out, "run_in", lambda *_: pytest.fail("trained"))
    Path("file").write_text("")
    with turn(Path(held), silent, "--out"), pytest.raises(UserError, match=words):
        main(["run", str(made / "tiny"), str(made / "mine.toml"), "--what", "x", "--out", place])
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing of another run's was written over"


def test_a_run_that_was_interrupted_goes_on_and_says_the_same(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "data", tmp_path / "data")
    trained: list[str] = []

    def killed_at_the_second(tree: Path, arguments: list[str], threads: int) -> None:
        trained.append(arguments[arguments.index("--seed") + 1])
        if len(trained) == 2:
            raise KeyboardInterrupt
        in_this_process(tree, arguments, threads)

    command = [
        "run",
        str(made / "tiny"),
        str(made / "mine.toml"),
        "--what",
        "a <tiny> one",
        "--by",
        "us",
        "--out",
        "again",
    ]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(carry_out, "run_in", killed_at_the_second)
        main(command)
    assert not Path("again").exists()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="seed3: holds an attempt with code"):
        patch.setattr(attempt, "code_here", lambda: "another")
        main(command)
    main(command)
    first, second = read_record(made / "1-mine"), read_record(Path("again"))
    assert [replace(one, seconds=0.0) for one in first.results] == [replace(one, seconds=0.0) for one in second.results]
    with pytest.raises(UserError, match="again: there already"):
        main(command)
    with pytest.raises(UserError, match="holds an attempt with"):
        main(["try", str(made / "tiny"), str(made / "mine.toml"), "--seed", "3", "--optim.lr=0.02",
              "--out", "runs/speedrun/tiny/again/seed3"])  # fmt: skip


def test_the_table_has_records_that_beat_those_before_and_no_others(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table, "task_names", lambda: ["tiny"])
    monkeypatch.setattr(table, "read_task", lambda name: task_of(made))
    monkeypatch.chdir(tmp_path)
    page, folder = tmp_path / "docs" / "speedrun.md", tmp_path / "docs" / "speedrun" / "tiny"
    shutil.copytree(made / "1-mine", folder / "1-mine")
    page.write_text("# Rules\n")
    shutil.copytree(made / "data", tmp_path / "data")
    for seed in ("20", "21"):
        for note, flag in (("nothing", ()), ("a fast start", ("--optim.ema_decay=0.5", "--optim.warmup_steps=1"))):
            main(["try", str(made / "tiny"), str(folder / "1-mine" / "recipe.toml"), "--seed", seed, "--note", note,
                  "--out", f"r{seed}-{len(flag)}", *flag])  # fmt: skip
    for seed, code, says in (("3", Code(HEAD, ""), "one of the task's"), ("20", Code(HEAD, "x"), "commit the change")):
        monkeypatch.setattr(tried, "current_code", lambda code=code: code)
        with pytest.raises(UserError, match=says):
            main(["try", str(made / "tiny"), str(made / "mine.toml"), "--seed", seed, "--note", "x", "--out", "none"])
    assert not Path("none").exists()
    main(["table", str(page), "--html", "board.html"])
    text, html = page.read_text(), (tmp_path / "board.html").read_text()
    assert (
        text.startswith("# Rules\n")
        and "| 1 | a &lt;tiny&gt; one |" in text
        and record.identity(folder / "1-mine") in text
    )
    assert "a &lt;tiny&gt; one" in html and "<tiny>" not in html and "<code>--optim.ema_decay=0.5</code>" in html
    assert html.count("<svg") == 1 and html.count("data:image/png;base64,") == 1
    assert "| a fast start | 1-mine | `--optim.ema_decay=0.5` `--optim.warmup_steps=1` | 20, 21 |" in text
    rows = [line.split(" | ") for line in text.splitlines() if " | 1-mine | " in line]
    distances = [float(cells[5].partition(" ")[0]) for cells in rows]
    assert len(rows) == 2 and distances == sorted(distances) and len(set(distances)) == 2
    main(["table", str(page)])
    assert page.read_text() == text
    with pytest.raises(UserError, match="no such page"):
        main(["table", str(tmp_path / "none.md")])
    (tmp_path / "other.md").write_text("# Another page\n")
    with pytest.raises(UserError, match=r"other\.md: neither tables of the speedrun in it nor a folder"):
        main(["table", str(tmp_path / "other.md")])
    assert (tmp_path / "other.md").read_text() == "# Another page\n"
    with pytest.raises(UserError, match="the page itself"):
        main(["table", str(page), "--html", str(page)])
    tries = (folder / "tried.jsonl").read_text()
    for bad in ("[" * 10**5, tries.replace('"seed": 20', f'"seed": {"9" * 400}'), tries.replace("nothing", "a | b")):
        (folder / "tried.jsonl").write_text(bad)
        with pytest.raises(UserError, match=r"tried\.jsonl: line 1"):
            main(["table", str(page)])
    (folder / "tried.jsonl").write_text(tries)
    (folder / "3 |").mkdir()
    with pytest.raises(UserError, match=r"3 \|: a record's folder is named by"):
        main(["table", str(page)])
    (folder / "3 |").rmdir()
    (folder / "3-none").mkdir()
    with pytest.raises(UserError, match=r"3-none/SHA256SUMS"):
        main(["table", str(page)])
    (folder / "3-none").rmdir()
    shutil.copytree(made / "1-mine", folder / "2-same")
    with pytest.raises(UserError, match=r"2-same: neither 10% fewer FLOPs nor 10% less time"):
        main(["table", str(page)])
    changed_byte(folder / "1-mine" / CLAIM, 200)
    with pytest.raises(UserError, match="1-mine"):
        main(["table", str(page)])


def test_the_records_of_this_repository_are_true_and_stand_in_the_tables(tmp_path: Path) -> None:
    """All but the run again, which each of them takes minutes for."""
    shutil.copytree(ROOT / "docs" / "speedrun", tmp_path / "speedrun")
    shutil.copy2(ROOT / "docs" / "speedrun.md", tmp_path / "speedrun.md")
    table.write_table(tmp_path / "speedrun.md", None, silent)
    assert (tmp_path / "speedrun.md").read_text() == (ROOT / "docs" / "speedrun.md").read_text()
    for task in ("digits", "fashion"):
        folder = ROOT / "docs" / "speedrun" / task
        lines = tried.read_tried(folder)
        assert len({one.what for one in lines}) >= 10 and {one.seed for one in lines}.isdisjoint(read_task(task).seeds)
        for one in lines:
            own = folder / f"{one.recipe}.toml"
            rules.read(own if own.exists() else folder / one.recipe / RECIPE, read_task(task), one.overrides)
