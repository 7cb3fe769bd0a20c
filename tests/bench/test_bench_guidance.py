"""The table of guidance: which runs it takes, what each setting asks of the scorer, and how a row reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import guidance
from st_fast.core.errors import UserError
from tests.report.conftest import plain


def study(folder: Path, seeds: int = 1) -> Path:
    """Finished runs of every network; what they trained is no matter here."""
    for seed in range(seeds):
        for name in guidance.NETWORKS:
            plain(folder / f"seed{seed}" / name)
    return folder


def cut(run: Path, *records: dict) -> None:
    """The run's log without its end, then these records."""
    lines = [line for line in (run / "log.jsonl").read_text().splitlines() if '"kind": "end"' not in line]
    (run / "log.jsonl").write_text("\n".join([*lines, *map(json.dumps, records)]) + "\n")


def test_only_seeds_whose_runs_are_all_done_for_the_largest_budget_are_taken(tmp_path):
    folder = study(tmp_path, seeds=4)
    flops = guidance.ended(folder / "seed0" / "plain")
    assert flops == pytest.approx(1600 * 128 * 1.5e9)
    end = {"kind": "end", "stage": "plain", "time": 1.8e9, "seconds": 1.0}
    cut(folder / "seed1" / "ig")  # still training
    half = end | {"step": 800, "flops": flops / 2}
    for name in guidance.NETWORKS:  # a smaller budget, all of them
        cut(folder / "seed2" / name, half)
        log = folder / "seed2" / name / "log.jsonl"
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= 800]
        log.write_text("\n".join(kept) + "\n")
    cut(folder / "seed3" / "tread", half)  # ended once, and went on
    assert guidance.seeds_of(folder) == ([folder / "seed0"], flops)
    assert guidance.ended(folder / "seed2" / "ig") == flops / 2 and guidance.ended(folder / "seed3" / "tread") == 0.0
    with pytest.raises(UserError, match=r"no seed there has finished runs of plain, ig"):
        guidance.seeds_of(tmp_path / "nowhere")


def test_each_kind_of_guidance_asks_for_itself_alone_and_a_strength_of_one_for_none(tmp_path, monkeypatch):
    asked = []

    def evaluate(options: list[str]) -> None:
        asked.append(dict(zip(options[1::2], options[2::2], strict=False)) | {"words": options})
        record = tmp_path / "record.json"
        record.write_text(json.dumps({"metrics": {"classifier_frechet": 0.5}}))
        print("some line", record, sep="\n")

    monkeypatch.setattr(guidance, "evaluate", evaluate)
    for kind in guidance.FLAGS:
        assert guidance.score(Path("run"), kind, 2.0, 70) == 0.5
        guidance.score(Path("run"), kind, 1.0, 70)
    strong, none = asked[::2], asked[1::2]
    assert all(one["words"] == none[0]["words"] for one in none), "one set, whatever the kind"
    told = [
        [w[w.index(flag) + 1] if flag in (w := one["words"]) else None
         for flag in ("--cfg-scale", "--internal-guidance", "--guidance")]
        for one in strong
    ]  # fmt: skip
    assert told == [["2", "1", "cfg"], ["1", "2", None], ["2", "1", "path_drop"]]


def test_a_row_has_its_best_in_bold_and_the_range_over_seeds():
    found = {("sprint", guidance.PATH_DROP): [[0.4, 0.5], [0.2, 0.3], [0.3, 0.4], [0.5, 0.6], [0.9, 1.0]]}
    text = guidance.table(found, 1_000, 1.5e13)
    assert "| SPRINT | path drop | 0.450 (0.400 to 0.500) | **0.250** (0.200 to 0.300) |" in text
    assert "15\u00a0TFLOP of training each, 2 seeds, 1,000 samples" in text
