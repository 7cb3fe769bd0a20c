"""How long a study is predicted to take: what is counted, what is added, and that the GPU day's fits its call."""

import re

import pytest

from bench import checks, predict_study
from bench.counting import Kernel
from bench.machine import ROOT
from bench.predict import DEVICES, Rates
from bench.predict_study import Trained
from st_fast.study.plan import read_study

RATES = Rates("made up", copy=2e12, matmul=1e15, gib=80.0)
KERNELS = [Kernel("st_fast::noise", "noise", 1.76e9), Kernel("aten::mm", "heads", 0.0, flops=7.8e11, launches=4)]
STEP = 1e-3 + 1e-3 + 5 * 3e-6


def test_a_run_takes_its_steps_and_the_whole_a_margin_and_every_start_more():
    runs = [Trained("a", 300, KERNELS), Trained("b", 50, KERNELS)]
    assert runs[0].step(RATES) == pytest.approx(STEP)
    assert predict_study.training_seconds(runs, RATES) == pytest.approx(350 * STEP)
    assert predict_study.whole_seconds(runs, RATES) == pytest.approx(1.4 * 350 * STEP + 2 * 8 + 45)
    last = predict_study.report(runs).splitlines()[-1].split("|")
    assert last[1].strip() == "× 1.4, + 8 s a run, + 45 s" and last[2].strip() == "350"


@pytest.fixture(scope="module")
def runs() -> list[Trained]:
    return predict_study.trained(read_study(checks.STUDY))


def test_equal_work_is_counted_once_and_a_network_that_only_is_drawn_not_at_all(runs):
    by_name = {run.name.removeprefix("seed0/"): run for run in runs}
    assert list(by_name) == ["teacher-stage1", "plain", "omega5", "stage1", "omega30", "random_teacher"]
    assert by_name["omega5"].kernels is by_name["random_teacher"].kernels
    assert by_name["stage1"].kernels is by_name["teacher-stage1"].kernels
    plain, first, second = (by_name[name].step(DEVICES[0]) for name in ("plain", "stage1", "omega5"))
    assert plain < first < second


def test_the_days_study_fits_its_call_and_its_comment_says_what_is_predicted(runs):
    most = re.search(r"day (\d+) convergence", (ROOT / "bench" / "day.sh").read_text())
    assert most
    room = int(most[1]) - checks.SAVING
    training, whole = (
        [seconds(runs, rates) for rates in DEVICES]
        for seconds in (predict_study.training_seconds, predict_study.whole_seconds)
    )
    assert max(whole) <= room
    told = " ".join(line.lstrip("# ") for line in checks.STUDY.read_text().splitlines() if line.startswith("#"))
    steps, *figures = (
        int(figure.replace(",", ""))
        for figure in re.findall(r"([\d,]+) (?:steps|s\b)", told[told.index("Training ") : told.index(": predicted")])
    )
    assert steps == sum(run.steps for run in runs)
    assert figures == pytest.approx([*training, *whole, room], rel=0.03)
