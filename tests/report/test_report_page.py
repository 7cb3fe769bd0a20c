"""The page is self-contained, says what the logs say, and can't be hurt by what stands in them."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.recipe.routing import PUBLISHED_RATE
from st_fast.report import words, write_report
from st_fast.report.__main__ import main
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_runs
from st_fast.report.figures import Bars, Chart, Curve, Level, all_figures
from st_fast.report.html import _embedded
from st_fast.report.plot import draw, smoothed, svg, thinned
from st_fast.report.repeats import choose_baseline, group_by_seed, verdict

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"


class Page(HTMLParser):
    """What a browser would load from a page, its elements and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def page_of(*paths: Path) -> Page:
    return Page(write_report(list(paths), out=paths[0] / "report.html").read_text(encoding="utf-8"))


def test_page_loads_nothing_from_outside_and_runs_no_script(runs) -> None:
    page = page_of(runs.two_stages(), runs.plain())
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(source.startswith("data:image/") for source in page.values("src"))
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "srcset"]
    style = page.words[page.words.index(next(w for w in page.words if ":root" in w))]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "default-src 'none'" in " ".join(page.values("content"))
    assert page.values("href") == ["https://arxiv.org/abs/2601.07773"]


def test_hostile_names_in_log_and_recipe_are_shown_as_text(runs) -> None:
    run = runs.two_stages(f"run {HOSTILE}".replace("/", "∕"))
    runs.change(run, lambda r: r | {"stage": HOSTILE if r["stage"] == "transcend" else r["stage"], "device": HOSTILE})
    recipe = run / "recipe.toml"
    quoted = json.dumps(HOSTILE, ensure_ascii=False)
    recipe.write_text(
        recipe.read_text().replace('name = "transcend"', f"name = {quoted}").replace('"data/digits"', quoted)
    )
    page, harmless = page_of(run, runs.plain()), page_of(runs.two_stages(), runs.plain())
    assert "script" not in page.tags
    assert all(source.startswith("data:image/") for source in page.values("src"))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text, "shown, but as text"
    assert "{{7*7}}" in page.text
    for tag in ("img", "svg", "text", "path", "figure", "details", "a", "i"):
        assert page.tags.count(tag) == harmless.tags.count(tag), "names add no element"


def test_verdict_of_one_run_says_quality_limits_and_the_teachers_share(runs) -> None:
    found = verdict(make_arms(read_runs([runs.two_stages()])))
    assert found.sentence.startswith("“transcend” reaches Fréchet distance 0.374 (real images: 0.152), accuracy 92.7")
    assert "(real images: 99.4\u00a0%)" in found.sentence
    # (600·1.5 + 1000·0.4) / (600·1.5 + 1000·1.9) of the FLOPs
    assert "358\u00a0TFLOP and 3\u00a0min, 46.4\u00a0% of the FLOPs" in found.sentence
    assert "a single seed" in found.sentence and not found.lines


def test_verdict_of_several_runs_compares_at_equal_cost_and_says_when_the_goal_was_reached(runs) -> None:
    sentence = verdict(make_arms(read_runs([runs.plain(), runs.two_stages()]))).sentence
    assert sentence.startswith("With one seed, which can't tell chance from effect, no arm beats “plain”")
    assert "the next is “digits · transcend”" in sentence and "better in 0 of 1" in sentence
    # 600·1.5 + 1000·1.9 of 1600·1.5 GFLOP; 1000 of 1600 steps; 60 + 120 of 160 s
    assert "after 116.7\u00a0% of the baseline's FLOPs, 62.5\u00a0% of its steps and 112.5\u00a0% of" in sentence


def test_verdict_turns_when_the_other_run_is_better_or_never_gets_there(runs) -> None:
    def scored(value: float) -> str:
        run = runs.two_stages()
        runs.change(run, lambda r: r | {"metrics": r["metrics"] | {"frechet": value}} if "metrics" in r else r)
        return verdict(make_arms(read_runs([runs.plain(), run]))).sentence

    assert "it never reaches that final score" in scored(9.0)
    assert "“digits · transcend” is best at the cost of “plain”" in scored(0.1)
    assert "better in 1 of 1" in scored(0.1)


def test_without_a_plain_run_the_second_best_is_the_baseline_and_unknown_costs_are_not_compared(runs) -> None:
    paths = [runs.two_stages("a"), runs.two_stages("b", seed=0)]
    runs.change(paths[0], lambda r: r | {"metrics": r["metrics"] | {"frechet": 0.2}} if "metrics" in r else r)
    recipe = paths[1] / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("cfg_scale = 3.0", "cfg_scale = 4.0"))
    assert "“a · transcend” is best at the cost of “b · transcend”" in verdict(make_arms(read_runs(paths))).sentence
    recipe.write_text(recipe.read_text().replace('teacher = "align"', 'teacher = "/nowhere"'))
    found = verdict(make_arms(read_runs(paths)))
    assert "“a · transcend” ends best" in found.sentence and "can't be compared at equal cost" in found.sentence
    assert not found.lines


def test_without_evaluations_nothing_is_claimed_of_quality(runs) -> None:
    run = runs.change(runs.two_stages(), lambda r: None if r["kind"] in ("eval", "sample", "end") else r)
    page = page_of(run)
    assert "No samples were scored" in page.text
    assert "No evaluation was logged" in page.text and f"python -m st_fast.evaluate {run}" in page.text
    assert "recall" not in page.text and "recall" in page_of(runs.plain()).text
    assert "img" not in page.tags
    assert "has not ended" in page.text


def test_a_run_that_has_only_begun_still_has_a_page(runs) -> None:
    run = runs.two_stages()
    runs.change(run, lambda r: r if r["kind"] == "start" and r["stage"] == "align" else None)
    assert "No training step was logged yet" in page_of(run).text


def test_pictures_are_the_runs_first_and_last_and_decode(runs) -> None:
    run = runs.plain()
    page = page_of(run)
    sources = [value for value in page.values("src") if value]
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]
    assert {picture.size for picture in pictures} == {(320, 128)}
    assert len(pictures) == 1 + 5, "one large, and a strip of five of the eight"
    original = Image.open(run / "plain" / "samples" / "00001600.png").tobytes()
    assert pictures[0].tobytes() == pictures[-1].tobytes() == original


def test_every_picture_and_figure_opens_large_without_a_script_and_is_on_the_page_once(runs) -> None:
    page = page_of(runs.two_stages(), runs.plain())
    opened = [value for tag, name, value in page.attributes if (tag, name) == ("div", "id")]
    assert len(opened) == len(set(opened)) == page.tags.count("img") + page.tags.count("svg") > 20
    assert sorted(page.values("popovertarget")) == sorted(opened * 2), "a button that opens and one that closes each"
    assert page.values("popovertargetaction") == ["hide"] * len(opened)
    assert all(page.values("aria-label")) and page.tags.count("button") == 2 * len(opened)
    strips = [source for source in page.values("src") if source]
    assert len(strips) - len(set(strips)) <= 3 + 1, "only the largest and those at equal cost stand there twice"


def gridded(path: Path, mode: str) -> None:
    """A grid of two by two dark images of 4 × 4 with white gaps of 2 pixels between them and around."""
    grid = Image.new(mode, (14, 14), "white")
    for left, top in ((2, 2), (8, 2), (2, 8), (8, 8)):
        grid.paste(Image.new(mode, (4, 4), "black"), (left, top))
    grid.putpixel((3, 3), 255 if mode == "L" else (255, 255, 255))
    grid.save(path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_page_shows_through_a_grids_gaps_and_not_through_its_images(tmp_path: Path, mode: str) -> None:
    gridded(tmp_path / "grid.png", mode)

    def shown(name: str, gaps: bool) -> Image.Image:
        uri, size = _embedded(tmp_path, name, 520, gaps)
        picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
        assert picture.size == size
        return picture

    alpha = shown("grid.png", True).getchannel("A")
    places = [(x, y) for x in range(14) for y in range(14) if alpha.getpixel((x, y))]
    inside = {*range(2, 6), *range(8, 12)}
    assert places == [(x, y) for x in range(14) for y in range(14) if x in inside and y in inside]
    assert {alpha.getpixel(place) for place in places} == {255}
    assert shown("grid.png", False).mode == mode
    for name, colour in (("white.png", 255), ("dark.png", 9)):
        Image.new("L", (8, 8), colour).save(tmp_path / name)
        assert shown(name, True).mode == "L", "no grid"
    Image.new("RGBA", (8, 8), (255, 255, 255, 70)).save(tmp_path / "clear.png")
    assert shown("clear.png", True).getchannel("A").getextrema() == (70, 70), "as it was drawn"


def test_the_classes_in_the_pictures_are_named_where_the_log_has_names(runs) -> None:
    run = runs.plain()
    assert "Classes in turn" not in page_of(run).text
    for classes, shown in ((["cat", "<b>dog</b>"], True), ("cat", False), ([], False)):
        runs.change(run, lambda r, c=classes: r | {"classes": c} if r["kind"] == "sample" else r)
        assert ("Classes in turn, row by row: cat, <b>dog</b>." in page_of(run).text) == shown


def test_scored_samples_beside_the_nearest_real_pictures_are_shown_once_for_each_stage(runs) -> None:
    run = runs.two_stages()
    without = page_of(run)
    assert "nearest real pictures" not in without.text
    for step, grey in ((600, 10), (800, 20), (1000, 30)):
        Image.new("L", (40, 20), grey).save(run / f"{step}-nearest.png")
    runs.change(run, lambda r: r | {"file": f"{r['step']}-nearest.png"} if r["kind"] == "eval" else r)
    page = page_of(run)
    added = [s for s in page.values("src") if s and s not in without.values("src")]
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in added]
    assert [(picture.size, picture.getpixel((0, 0))) for picture in pictures] == [((40, 20), 10), ((40, 20), 30)]
    assert "Beside the nearest real pictures" in page.text


def test_pictures_outside_the_run_missing_or_broken_are_noted_and_left_out(runs, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8)).save(secret)
    for bad in ("../secret.png", str(secret), "align/samples/none.png", "log.jsonl", "link.png"):
        run = runs.two_stages()
        (run / "link.png").unlink(missing_ok=True)
        (run / "link.png").symlink_to(secret)
        runs.change(run, lambda r, bad=bad: r | {"file": bad} if r["kind"] == "sample" and r["stage"] == "align" else r)
        page = page_of(run)
        assert "it is left out" in page.text
        assert len([s for s in page.values("src") if s]) == 1 + 5, "the other stage's pictures are there"


def test_very_large_pictures_become_small_ones(runs) -> None:
    run = runs.plain()
    noise = Image.effect_noise((2400, 1600), 90).convert("RGB")
    noise.save(run / "plain" / "samples" / "00001600.png")
    page_of(run)
    assert (run / "report.html").stat().st_size < 2_000_000


def test_runs_that_differ_in_more_than_their_stages_are_marked(runs) -> None:
    alike = page_of(runs.two_stages("a"), runs.plain("b"))
    assert "Compare with care" not in alike.text
    differing = page_of(runs.two_stages("a"), runs.plain("b", seed=3))
    assert "run.seed" in differing.text
    assert "Compare with care" in differing.text
    other = runs.change(
        runs.plain("b"), lambda r: r | {"metrics": r["metrics"] | {"classifier_digest": "cd"}} if "metrics" in r else r
    )
    assert "their classifiers differ" in page_of(runs.two_stages("a"), other).text


def test_a_chart_draws_its_points_levels_rings_and_ranges() -> None:
    curve = Curve("a $x$", [100.0, 300.0], [0.5, 0.25], 1, ringed=[1], low=[0.4, 0.2], high=[0.6, 0.3])
    figure = Chart("k", "Title", "", "steps", "steps", "Distance", "number", True, [curve], [Level("real", 0.125)])
    axes = draw(figure).axes[0]
    line, ring, level = axes.lines
    assert line.get_xydata().tolist() == [[100.0, 0.5], [300.0, 0.25]]
    assert ring.get_xydata().tolist() == [[300.0, 0.25]] and set(level.get_ydata()) == {0.125}
    assert axes.get_yscale() == "log" and (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "Distance")
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (0.2, 0.6)
    assert "real: 0.125" in [text.get_text() for text in axes.texts]


def test_long_names_keep_their_ends_and_leave_room_for_the_totals_beside_them(runs) -> None:
    names = ["self-transcendence-with-omega-30-" * 3 + end for end in ("a", "b")]
    arms = make_arms(read_runs([runs.two_stages(names[0]), runs.two_stages(names[1])]))
    figures = all_figures(arms)
    shown = [text.get_text() for text in draw(figures["quality"][0]).legends[0].get_texts()]
    assert len(set(shown)) == 4 and max(map(len, shown)) <= 42
    assert shown[0].startswith("self-trans") and shown[0].endswith("-a · align")
    canvas = draw(figures["costs"][0])
    canvas.draw_without_rendering()
    texts = [text for text in canvas.axes[0].texts if text.get_text()]
    pairs = [
        (label.get_window_extent(), total.get_window_extent())
        for label, total in zip(texts[::2], texts[1::2], strict=True)
    ]
    assert len(pairs) == 4 and all(label.x1 < total.x0 for label, total in pairs)


def test_bars_end_at_their_sums_and_say_them(runs) -> None:
    figures = all_figures(make_arms(read_runs([runs.two_stages()])))["costs"]
    for figure in figures:
        assert isinstance(figure, Bars)
        axes = draw(figure).axes[0]
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches[-len(figure.rows) :]]
        assert ends == pytest.approx([sum(row.sizes) for row in figure.rows])
    assert "358\u00a0TFLOP" in [text.get_text() for text in draw(figures[0]).axes[0].texts]


def test_colours_of_the_page_follow_its_style_sheet_and_titles_are_escaped(runs) -> None:
    figures = all_figures(make_arms(read_runs([runs.two_stages(), runs.plain()])))
    style = page_of(runs.two_stages()).words
    for figure in (one for drawn in figures.values() for one in drawn):
        drawn = svg(figure)
        assert not re.findall(r"(?:stroke|fill): #(?!f{6})[0-9a-f]{6}", drawn), "a colour that dark mode can't change"
        for name in set(re.findall(r"var\((--\w+)\)", drawn)):
            assert any(f"{name}: #" in text for text in style)
    chart = figures["quality"][0]
    assert "<b>" not in svg(replace(chart, title="<b>", curves=[replace(chart.curves[0], label="<b>")]))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("unit", ["number", "percent", "steps", "flops", "seconds"])
@pytest.mark.parametrize(("low", "high"), [(0.13, 0.14), (1.0, 1.0), (0.02, 900.0), (3e14, 9e17), (1e-9, 1e9)])
def test_ticks_are_few_whatever_is_drawn(low: float, high: float, log: bool, unit: str) -> None:
    figure = Chart("k", "t", "", "x", unit, "y", unit, log, [Curve("a", [low, high], [low, high], 0)])
    axes = draw(figure).axes[0]
    for axis, (start, end) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        inside = [tick for tick in axis.get_majorticklocs() if start <= tick <= end]
        assert 1 <= len(inside) <= 8


def test_long_series_are_thinned_to_means_and_smoothing_keeps_a_line_straight() -> None:
    x, y = thinned([float(i) for i in range(3001)], [2.0 * i for i in range(3001)])
    assert len(x) <= 300
    assert x[-1] == 3000
    assert sum(y[:-1]) / len(y[:-1]) == pytest.approx(x[-2], abs=1)
    line = [3.0 * i for i in range(200)]
    assert smoothed(line) == pytest.approx(line)
    bumpy = [float(i % 2) for i in range(400)]
    assert max(smoothed(bumpy)[20:-20]) < 0.6


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "st_fast.report", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_command_writes_the_page_and_every_figure_as_png_and_json(runs, tmp_path: Path) -> None:
    out, folder = tmp_path / "new" / "page.html", tmp_path / "figures"
    done = command(runs.two_stages(), runs.plain(), "--out", out, "--export", folder)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(out), "")
    names = sorted(path.stem for path in folder.glob("*.png"))
    assert names == sorted(path.stem for path in folder.glob("*.json"))
    expected = {
        "accuracy_flops",
        "frechet_step",
        "frechet_seconds",
        "loss_denoise",
        "cost_flops",
        "mfu",
        "images_per_s",
    }
    assert expected <= set(names)
    data = json.loads((folder / "frechet_step.json").read_text())
    assert [curve["label"] for curve in data["curves"]] == ["digits · align", "digits · transcend", "plain"]
    assert data["curves"][2]["x"] == [200.0 * i for i in range(1, 9)]
    assert Image.open(folder / "loss_denoise.png").width > 800
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_command_tells_mistakes_in_one_line_and_leaves_the_old_page(runs) -> None:
    run = runs.two_stages()
    (run / "report.html").write_text("old")
    (run / "log.jsonl").write_text("broken\nbroken\n")
    done = command(run)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Line 1 of the log is no record: 'broken'" in done.stderr
    assert (run / "report.html").read_text() == "old"


@pytest.mark.parametrize("option", ["--out", "--export"])
@pytest.mark.parametrize("name", ["log.jsonl", "recipe.toml", "new.txt", "new", "dir.html", ".", "..", "/"])
def test_only_a_page_is_written_where_the_page_goes_and_figures_only_into_a_folder(
    runs, monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    run = runs.plain()
    monkeypatch.chdir(run)
    (run / "dir.html").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in runs.folder.rglob("*")}
    if option == "--export" and not Path(name).is_file():
        main([".", option, name, "--dry-run"])
    else:
        with pytest.raises(UserError, match=f"^{option} {re.escape(str(Path(name)))}: ") as error:
            main([".", option, name])
        assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert {path: path.is_file() and path.read_bytes() for path in runs.folder.rglob("*")} == before


def test_dry_run_prints_the_verdict_and_writes_nothing(runs) -> None:
    run = runs.two_stages()
    before = sorted(run.rglob("*"))
    done = command(run, "--dry-run")
    assert done.returncode == 0
    assert "92.7" in done.stdout
    assert sorted(run.rglob("*")) == before


def test_help_has_examples() -> None:
    assert "examples:" in command("--help").stdout


def test_each_figure_is_a_sign_of_life(runs, tmp_path: Path) -> None:
    beats: list[int] = []
    text = write_report([runs.plain()], out=tmp_path / "page.html", beat=lambda: beats.append(1)).read_text()
    assert len(beats) == 1 + text.count("</svg>") > 5


def test_a_page_that_cant_be_written_is_one_line(runs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_report([runs.plain()], out=tmp_path / "file" / "page.html")


def test_the_report_needs_no_torch() -> None:
    code = "import sys, st_fast.report; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def add_probe(run: Path) -> Path:
    """A probe with one very wide figure."""
    (run / "probe").mkdir()
    Image.new("RGB", (1900, 400), "white").save(run / "probe" / "wide.png")
    figure = {"file": "wide.png", "title": "Wide", "caption": "A caption."}
    (run / "probe" / "probe.json").write_text(json.dumps({"figures": [figure], "held_out_images": 9}))
    return run


LOOK = """
const open = document.querySelectorAll('header .zoom > button')[0], large = document.querySelector('header .large');
const picture = large.querySelector('img'), small = picture.clientWidth;
const boxes = [...document.querySelectorAll('.scroll')].filter(box => !box.closest('.probe'));
const white = [...document.querySelectorAll('body, body *')].filter(one => !one.closest('.probe')).map(
  one => getComputedStyle(one).backgroundColor.match(/[0-9.]+/g).map(Number)
).filter(([red, green, blue, alpha = 1]) => alpha > 0 && Math.min(red, green, blue) > 200);
const found = [document.documentElement.scrollWidth, document.querySelectorAll('svg path').length, white.length,
  boxes.filter(box => box.scrollWidth > box.clientWidth).length];
open.focus(); open.click();
found.push(small, picture.clientWidth, large.querySelector('button').clientHeight);
large.querySelector('button').click();
found.push(picture.clientWidth, +(document.activeElement === open));
parent.postMessage(found.join(' '), '*');
"""
"""Sends: the page's width, its paths, its white boxes, its tables wider than theirs; a picture's width on the page, at
a click, the height of what closes it, its width after that, and whether the keyboard is where it was.
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page with")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (420, False), (390, True)])
def test_chromium_draws_the_page_without_a_complaint_light_and_dark_and_nothing_is_wider_than_the_window(
    runs, tmp_path: Path, width: int, dark: bool
) -> None:
    hostile = runs.plain("<img src=x onerror=boom()>")
    paths = [add_probe(runs.two_stages()), hostile, runs.two_stages("seed1_" + 7 * "and_a_long_name_", 1)]
    out = write_report([*paths, runs.plain("plain1", 1)], out=tmp_path / "page.html", seeds_declared=True)
    html = out.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    out.write_text(html.replace("</body>", f"<script>{LOOK}</script></body>"))
    # A window of Chromium is at least 500 pixels wide; a frame in it may be as narrow as a phone.
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<meta name=color-scheme content='light dark'><title></title>"
        "<script>onmessage = message => document.title = message.data</script>"
        f'<iframe src="page.html" width="{width}" height="900"></iframe>'
    )
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command_line = ["chromium", *flags.split(), "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    command_line += [
        "--enable-logging=stderr",
        "--log-level=0",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1500,1000",
        "--virtual-time-budget=3000",
        "--dump-dom",
        f"file://{frame}",
    ]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=True)
    shown = re.search(r"<title>([\d ]+)</title>", done.stdout)
    assert shown is not None
    page, paths_drawn, white, wide, small, large, closing, again, focused = map(int, shown[1].split())
    assert page <= width and paths_drawn > 20
    assert (white > 0) == (not dark)
    assert wide == 0 or width < 1400, "a table that scrolls sideways"
    assert small < large > 0.9 * width - 60 and closing > 400, "a click shows it large, another one anywhere closes it"
    assert (again, focused) == (small, 1)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_a_stage_with_a_contrast_is_not_called_plain(runs) -> None:
    run = runs.plain()
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('supervision = "none"', 'supervision = "none"\ncontrast = 0.05'))
    text = page_of(run).text
    assert "Plain training with a contrast" in text and "contrast = 0.05" in text and "pushed away" in text
    assert "contrast" not in page_of(runs.plain("other")).text


def test_the_methods_table_has_a_routes_own_rate_and_a_variants_name_and_no_usual_value(runs) -> None:
    def told(name: str, keys: str) -> str:
        run = runs.plain(name)
        recipe = run / "recipe.toml"
        recipe.write_text(recipe.read_text().replace('supervision = "none"', keys))
        return page_of(run).text

    assert words.ROUTE_RATES == PUBLISHED_RATE
    assert "route_rate = 0.75" in told("routed", 'supervision = "none"\nroute = "sprint"\nroute_rate = "auto"')
    usual = 'supervision = "repa"\ndepth = 2\nstop_below = "off"\nstop_step = 0\ntarget_norm = 0.0\n'
    repa = told("repa", usual + 'projector = "mlp"').split("Recipe")[0]
    assert "depth = 2" in repa and not any(
        key in repa for key in ("iREPA", "stop_below =", "target_norm =", "projector =")
    )
    conv = told("irepa", usual.replace('"off"', "0.1").replace("norm = 0.0", "norm = 0.6") + 'projector = "conv"')
    assert "iREPA" in conv and "depth = 2, projector = conv, target_norm = 0.6, stop_below = 0.1" in conv


@pytest.mark.parametrize(("route", "name"), [("tread", "TREAD"), ("sprint", "SPRINT")])
def test_a_stage_with_a_route_is_not_called_plain_nor_taken_for_the_baseline(runs, route, name) -> None:
    run = runs.plain()
    recipe = run / "recipe.toml"
    keys = f'supervision = "none"\nroute = "{route}"\nroute_rate = 0.5\ndense_after = 3'
    recipe.write_text(recipe.read_text().replace('supervision = "none"', keys))
    page = page_of(run).text
    assert f"Plain training with {name}" in page and "route_rate = 0.5, until step 3" in page
    assert "the others are compared with it" not in page
    arms = make_arms(read_runs([run, runs.plain("other")]))
    assert choose_baseline(group_by_seed(arms), arms).label == arms[1].label
