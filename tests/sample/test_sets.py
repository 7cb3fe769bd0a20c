"""A set of samples is the same whoever draws it, however often it is interrupted, and readable by others."""

import hashlib
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from st_fast.core.errors import Interrupted, UserError
from st_fast.data.manifest import read_manifest, write_manifest
from st_fast.model import SiT
from st_fast.recipe import load
from st_fast.sample import __main__ as sample
from st_fast.sample.draw import NAMED, balanced, draw_of, known_as, names_in_turn, read_labels
from st_fast.sample.guided import sample as draw_samples
from st_fast.sample.model import Sampler, sampling
from st_fast.sample.previews import class_columns, free_name, save_png
from st_fast.sample.set import SampleSet, draw_set, open_npz, settings_of, write_npz
from tests.sample.tiny_run import command, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("sampling"))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(run):
    """The set of 10 samples by one uninterrupted process: three batches of four, two samples too many."""
    sample.main([str(run), "--num", "10", "--npz", "--png", "--out", str(run / "whole")])
    return run / "whole"


def test_the_npz_is_adms_layout_and_holds_what_the_model_draws(run, whole):
    with np.load(whole / "samples.npz") as found:
        assert found.files == ["arr_0", "arr_1"]
        images, labels = found["arr_0"], found["arr_1"]
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3, 4] * 2
    request = sample.parse([str(run), "--num", "10"])
    with sampling(request.samples) as (_, sampler, _):
        draw = balanced(3, 0, 4, 5, torch.device("cpu"))
        latents = draw_samples(sampler.model, draw, request.samples.settings, "linear")
    pixels = ((latents / 2 + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert np.array_equal(images[:4], pixels.byte().numpy())
    assert images.std() > 20
    assert not (whole / "parts").exists()


def test_single_images_and_the_grid_are_those_of_the_npz(whole):
    images = np.load(whole / "samples.npz")["arr_0"]
    names = sorted(path.name for path in (whole / "png").iterdir())
    assert names == [f"{i:06d}.png" for i in range(10)]
    for number, name in enumerate(names):
        assert np.array_equal(np.asarray(Image.open(whole / "png" / name)), images[number])
    grid = np.asarray(Image.open(whole / "grid.png"))
    factor = grid.shape[1] // (10 * 10 + 2)
    assert np.array_equal(grid[::factor, ::factor][2:10, 2:10], images[0])


def test_two_ranks_draw_the_bytes_of_one(run, whole):
    done = command("sample", run, "-n", 10, "--npz", "--out", run / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert digest(run / "two" / "samples.npz") == digest(whole / "samples.npz")


def test_a_set_that_was_interrupted_is_continued_to_the_same_bytes(run, whole, monkeypatch):
    drawn, draw = [], Sampler.images

    def killed_after_one(self, first, count):
        drawn.append(first)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(self, first, count)

    monkeypatch.setattr(Sampler, "images", killed_after_one)
    arguments = [str(run), "--num", "10", "--npz", "--out", str(run / "again")]
    with pytest.raises(KeyboardInterrupt):
        sample.main(arguments)
    assert not (run / "again" / "samples.npz").exists()
    sample.main(arguments)
    assert drawn == [0, 4, 4, 8], "what was kept is not drawn again"
    assert digest(run / "again" / "samples.npz") == digest(whole / "samples.npz")
    sample.main(arguments)
    assert len(drawn) == 4, "a complete set is left as it is"


def test_a_signal_stops_within_a_batch_keeps_those_before_and_says_how_to_go_on(run, monkeypatch):
    request, after = sample.parse([str(run), "--num", "10", "--npz", "--out", str(run / "stopped")]), []

    def forward(self, *arguments, real=SiT.forward):
        if (run / "stopped" / "parts" / "000000.safetensors").exists():
            after.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(SiT, "forward", forward)
    with pytest.raises(Interrupted) as told, sampling(request.samples) as (ranks, sampler, say):
        draw_set(sampler, request.target, False, ranks, say)
    assert str(told.value) == f"SIGTERM: 1 of 3 batches are kept in {run / 'stopped'}; the same command continues"
    assert told.value.exit_code == 75 and len(after) == 1


def test_other_settings_are_refused_in_one_line_that_names_them(run, whole):
    done = command("sample", run, "--num", 10, "--npz", "--out", whole, "--cfg-scale", 1.5, "--seed", 9)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cfg_scale 2.0 (now 1.5), seed 3 (now 9); choose another --out" in done.stderr


def test_other_weights_are_refused(tmp_path):
    run = make_run(tmp_path)
    arguments = [str(run), "--num", "4", "--npz", "--out", str(tmp_path / "set")]
    sample.main(arguments)
    make_run(tmp_path, seed=1, step=20)
    with pytest.raises(UserError, match=r"step 10 \(now 20\), model_sha256 \w+ \(now \w+\)"):
        sample.main(arguments)


def test_by_default_each_set_has_a_place_that_the_same_command_finds_again(tmp_path, capsys):
    run = make_run(tmp_path)
    folder, plain = run / "plain" / "samples", [str(run), "--num", "4", "--npz"]
    asked = [plain, [*plain, "--weights", "raw"], [*plain, "--seed", "4"], [*plain, "--cfg-range", "0.1", "0.7"]]
    places = []
    for arguments in asked:
        sample.main(arguments)
        places.append(capsys.readouterr().out.strip().splitlines()[-1])
    names = [place.removeprefix(f"{folder}/") for place in places]
    assert names[0] == "4-heun3-cfg2" and len(set(names)) == 4
    assert [name[:-8] for name in names[1:]] == [
        f"4-heun3-cfg2-{what}-" for what in ("raw-step10-seed3", "ema-step10-seed4", "ema-step10-seed3")
    ]
    for arguments, place in zip(asked, places, strict=True):
        sample.main(arguments)
        assert capsys.readouterr().out.splitlines()[-2:] == [f"{place}/samples.npz: complete already", place]
    make_run(tmp_path, seed=1, step=20)
    sample.main(plain)
    assert f"{folder}/4-heun3-cfg2-ema-step20-seed3-" in capsys.readouterr().out
    assert len({digest(path) for path in folder.glob("*/samples.npz")}) == 4, "raw and EMA are equal in this run"


@pytest.mark.parametrize("there", ["file", "other files", "damaged settings", "a link to nowhere"])
def test_whatever_lies_in_the_usual_place_stays_and_the_set_goes_beside_it(there, tmp_path):
    run = make_run(tmp_path)
    usual = run / "plain" / "samples" / "4-heun3-cfg2"
    usual.parent.mkdir()
    if there == "file":
        usual.write_text("mine")
    elif there == "a link to nowhere":
        usual.symlink_to(tmp_path / "nowhere")
    else:
        usual.mkdir()
        (usual / ("sample.json" if there == "damaged settings" else "mine.txt")).write_text("mine")
    sample.main([str(run), "--num", "4", "--npz"])
    [other] = (path for path in usual.parent.iterdir() if path != usual)
    assert other.name.startswith("4-heun3-cfg2-ema-step10-seed3-") and (other / "samples.npz").exists()
    assert os.path.lexists(usual) and not (usual / "samples.npz").exists()


def test_a_kill_before_the_settings_are_written_leaves_a_place_that_is_taken_again(run, whole):
    settings = json.loads((whole / "sample.json").read_text())
    settings.pop("format")
    (run / "killed").mkdir()
    (run / "killed" / "sample.json.partial-12").write_text("{")
    SampleSet(run / "killed", settings).begin()
    assert (run / "killed" / "sample.json").read_text() == (whole / "sample.json").read_text()
    (run / "mine").mkdir()
    (run / "mine" / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"mine: holds other files and no sample\.json"):
        SampleSet(run / "mine", settings).begin()


def test_a_damaged_batch_is_named(run, whole):
    settings = json.loads((whole / "sample.json").read_text())
    settings.pop("format")
    found = SampleSet(run / "hurt", settings)
    found.begin()
    (run / "hurt" / "parts").mkdir()
    (run / "hurt" / "parts" / "000000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"000000.safetensors: damaged .* remove it"):
        found.get(0)


def test_by_default_a_few_samples_are_one_picture_as_before(run, capsys):
    sample.main([str(run)])
    path = run / "plain" / "samples" / "12-heun3-cfg2.png"
    assert capsys.readouterr().out.strip().endswith(str(path))
    assert Image.open(path).width >= 480
    request = sample.parse([str(run), "--num", "1001"])
    assert request.is_set and request.samples.set_folder.name == "1001-heun3-cfg2"


def test_a_picture_never_takes_the_place_of_another(run, capsys):
    """One of other settings has a name of its own, and under a name that is given is refused before it is drawn."""
    said = []
    for flags in ((), ("--seed", "9"), ("--labels", "1"), ("--seed", "9"), ()):
        sample.main([str(run), "--num", "5", "--sampler", "euler", *flags])
        said.append(capsys.readouterr().out.strip().rpartition("/")[2])
    first, second, third = (f"5-euler3-cfg2{number}.png" for number in ("", "-2", "-3"))
    assert said == [first, second, third, second, first]
    folder = run / "plain" / "samples"
    assert len({digest(folder / name) for name in said}) == 3

    for kind, ending in (("--gif", ".gif"), ("--npz", "")):
        target = folder / f"given{ending}"
        sample.main([str(run), "--num", "5", kind, "--out", str(target)])
        sample.main([str(run), "--num", "5", kind, "--out", str(target)])  # the same again
        with pytest.raises(
            UserError, match=rf"given{ending}: holds samples drawn with seed 3 \(now 9\); choose another"
        ):
            sample.main([str(run), "--num", "5", kind, "--seed", "9", "--out", str(target)])
    mine = folder / "holiday.png"
    Image.new("L", (3, 4)).save(mine)
    for content in (mine.read_bytes(), b"no picture", b""):
        mine.write_bytes(content)
        with pytest.raises(UserError, match=r"holiday\.png: is there already"):
            sample.main([str(run), "--num", "5", "--out", str(mine)])
        assert mine.read_bytes() == content


def test_a_picture_larger_than_pillow_takes_is_known_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # 89 million
    sheet, record = torch.zeros(60, 480, 1, dtype=torch.uint8), {"seed": 3, "cfg_range": (0.0, 0.7)}
    save_png(sheet, tmp_path / "large.png", record=record)
    assert free_name(tmp_path / "large.png", record) == tmp_path / "large.png"
    assert free_name(tmp_path / "large.png", {"seed": 4}) == tmp_path / "large-2.png"


def test_labels_are_balanced_random_or_those_named(run):
    cpu = torch.device("cpu")
    assert balanced(3, 0, 2000, 5, cpu).labels.bincount().tolist() == [400] * 5
    assert draw_of(read_labels("0,3", 5), 3, 0, 4, cpu).labels.tolist() == [0, 3, 0, 3]
    drawn = draw_of(read_labels("random", 5), 3, 0, 2000, cpu).labels
    assert all(320 < count < 480 for count in drawn.bincount().tolist())
    later = draw_of(read_labels("random", 5), 3, 700, 10, cpu)
    assert later.labels.tolist() == drawn[700:710].tolist(), "a label follows from the sample's number"
    for wrong in ("0,5", "all", "", "-1", "٣", "9" * 5000):  # the last are too many digits for int()
        with pytest.raises(UserError, match="--labels"):
            read_labels(wrong, 5)


def test_classes_have_the_names_that_the_data_has(tmp_path, capsys):
    run, names = make_run(tmp_path), ("cat", "dog", "\x1b[31mfox", "0", "gnu")
    sample.main([str(run), "--num", "7"])
    assert "classes in turn" not in capsys.readouterr().out, "without names there is nothing to say"
    write_manifest(tmp_path / "data", replace(read_manifest(tmp_path / "data"), class_names=names))
    for flags, told in (
        (["--num", "7"], "classes in turn, row by row: cat, dog, \\x1b[31mfox, 0, gnu"),
        (["--num", "2", "--npz"], "classes in turn, row by row: cat, dog"),
        (["--num", "4", "--labels", "gnu, 0,dog"], "classes in turn, row by row: gnu, cat, dog"),
        (["--interpolate", "1", "7"], "classes of the rows: dog, \\x1b[31mfox"),
    ):
        sample.main([str(run), *flags])
        assert told in capsys.readouterr().out.splitlines()
    sample.main([str(run), "--num", "7", "--labels", "random"])
    assert "classes in turn" not in capsys.readouterr().out
    assert sample.parse([str(run), "--labels", "gnu, 0,dog"]).samples.labels.cycle == (4, 0, 1), "a number is a number"
    long = "g" * 10_000
    assert known_as(long) == f"{long[:80]}…" and max(map(len, names_in_turn([0, 1], (long, "\x1b")))) == 81
    with pytest.raises(UserError) as refused:
        read_labels("cow", 1, (long,))
    assert len(str(refused.value)) < 200
    with pytest.raises(UserError, match=r"--labels cow: balanced, random, or classes of 0..4 or cat, dog, .* commas"):
        sample.parse([str(run), "--labels", "cow"])


@pytest.mark.parametrize(("count", "more"), [(0, []), (NAMED, []), (NAMED + 1, ["…"])])
def test_at_most_twenty_classes_are_named_and_one_without_a_name_by_its_number(count, more):
    assert NAMED == 20 and names_in_turn([0] * count, ()) == []
    assert names_in_turn([0, 1] * count, ("cat",))[:NAMED] == ["cat", "1"] * min(count, NAMED // 2)
    assert names_in_turn([0] * count, ("cat",)) == ["cat"] * min(count, NAMED) + more


@pytest.mark.parametrize(("preset", "scale", "high"), [("repa", 1.8, 0.7), ("self-transcendence", 1.9, 0.65)])
def test_presets_are_the_published_settings_and_flags_win(run, preset, scale, high):
    found = sample.parse([str(run), "--preset", preset]).samples.settings
    assert (found.sampler, found.steps, found.cfg_scale, found.cfg_range) == ("sde", 250, scale, (0.0, high))
    assert sample.parse([str(run), "--preset", preset, "--steps", "7"]).samples.settings.steps == 7


def test_the_trajectory_is_a_gif_from_the_noise_to_the_image(run):
    sample.main([str(run), "--num", "10", "--gif", "--steps", "6"])
    with Image.open(run / "plain" / "samples" / "trajectory-10-heun6-cfg2.gif") as film:
        assert film.format == "GIF" and film.n_frames == 7
        film.seek(6)
        last = np.asarray(film.convert("RGB")).astype(int)
    sample.main([str(run), "--num", "10", "--steps", "6"])
    still = np.asarray(Image.open(run / "plain" / "samples" / "10-heun6-cfg2.png").convert("RGB")).astype(int)
    assert last.shape == still.shape and np.abs(last - still).mean() < 12, "a GIF has 256 colours"


def test_an_interpolation_begins_and_ends_at_the_samples_themselves(run):
    sample.main([str(run), "--interpolate", "2", "8", "--sampler", "euler"])
    picture = np.asarray(Image.open(run / "plain" / "samples" / "interpolate-2-8-euler3-cfg2.png"))
    factor = picture.shape[1] // 102
    picture = picture[::factor, ::factor].astype(int)
    request = sample.parse([str(run), "--sampler", "euler"])
    with sampling(request.samples) as (_, sampler, _):
        a, b = (sampler.images(number, 1)[0][0].permute(1, 2, 0).numpy().astype(int) for number in (2, 8))
    assert np.abs(picture[2:10, 2:10] - a).max() <= 1
    assert np.abs(picture[12:20, 92:100] - b).max() <= 1


def test_compiled_blocks_draw_the_same_images(run, whole, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: torch._dynamo.disable(function))
    sample.main([str(run), "--num", "10", "--npz", "--compile", "on", "--out", str(run / "compiled")])
    assert digest(run / "compiled" / "samples.npz") == digest(whole / "samples.npz")
    assert json.loads((run / "compiled" / "sample.json").read_text())["compiled"] is True


def test_a_file_larger_than_one_block_is_read_a_block_at_a_time(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 2, 3, 3), dtype=np.uint8)
    write_npz(tmp_path / "a.npz", (2, 3, 3), iter(np.split(images, [4, 8])), np.arange(11))
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], images)
    found = list(open_npz(tmp_path / "a.npz").blocks(5))
    assert [len(block) for block in found] == [5, 5, 1] and np.array_equal(np.concatenate(found), images)
    with pytest.raises(ValueError, match="8 images for 11 labels"):
        write_npz(tmp_path / "b.npz", (2, 3, 3), iter([images[:8]]), np.arange(11))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    np.savez(tmp_path / "c.npz", mu=np.zeros(3))
    for name, words in (("c.npz", "no arr_0"), ("d.npz", "missing")):
        with pytest.raises(UserError, match=words):
            open_npz(tmp_path / name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num", "0"], "--num 0: at least 1"),
        (["--cfg-range", "0.7", "0.2"], "0 ≤ LOW < HIGH ≤ 1"),
        (["--labels", "7"], "classes of 0..4"),
        (["--gif", "--npz"], "one picture"),
        (["--stage", "other"], "the run has plain"),
    ],
)
def test_bad_flags_are_told_in_one_line(run, flags, words):
    with pytest.raises(UserError) as error:
        sample.parse([str(run), *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_recipe_may_name_dopri5(run, tmp_path):
    assert load(run / "recipe.toml", ["--sample.sampler=dopri5"]).sample.sampler == "dopri5"


@pytest.mark.parametrize(("out", "flags"), [("folder", []), ("a.gif", []), ("a.png", ["--gif"])])
def test_a_picture_of_another_ending_is_refused_before_anything_is_drawn(out, flags, run, tmp_path):
    with pytest.raises(UserError, match=r"--out .*: a picture's name ends in \.(png|gif)"):
        sample.parse([str(run), "--out", str(tmp_path / out), *flags])


def test_a_class_may_have_commas_in_its_name():
    """As ImageNet's have on the hub."""
    names = ("tench, Tinca tinca", "tench", "great white shark, white shark, man-eater", "shark")
    asked = "tench, Tinca tinca, shark,1,tench,great white shark, white shark, man-eater,0"
    assert read_labels(asked, 4, names).cycle == (0, 3, 1, 1, 2, 0)
    with pytest.raises(UserError, match="--labels great white shark: "):
        read_labels("great white shark", 4, names)


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        ([0, 1, 2] * 5, 9), ([3, 0, 1, 2] * 8, 8), ([0, 1] * 3 + [0], 10), ([*range(7)] * 2, 7), ([*range(10)] * 2, 10),
        ([5] * 7, 10), ([*range(32)], 10), ([0, 1, 1, 0, 2, 1, 0, 0, 1, 2, 2, 1], 10), ([1], 10), ([], 10),
    ],
)  # fmt: skip
def test_each_of_few_classes_in_turn_has_columns_of_its_own(labels, columns):
    assert class_columns(labels) == columns


def test_a_file_by_itself_has_no_further_averages_and_a_run_is_asked_for_its_own(run, tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"^--weights ema-0.5: .*x.pt has at most ema and raw$"):
        sample.parse([str(tmp_path / "x.pt"), "--weights", "ema-0.5"])
    with pytest.raises(UserError, match=r"^--weights emma: .*run has ema, raw$"):
        sample.parse([str(run), "--weights", "emma"])


def test_shifted_sets_have_names_and_settings_of_their_own_and_older_ones_keep_theirs(run):
    usual, shifted = (sample.parse([str(run), *flags]).samples for flags in ((), ("--shift", "auto")))
    assert (usual.settings.shift, shifted.settings.shift) == (1.0, "auto")
    assert "shift" not in usual.drawn and shifted.drawn == usual.drawn.replace("3-", "3-shiftauto-")
    found = {}
    for request in (usual, shifted):
        with sampling(request) as (_, sampler, _):
            found[request.settings.shift] = settings_of(sampler)
    assert "shift" not in found[1.0] and found["auto"] == found[1.0] | {"shift": "auto"}
    assert sample.parse([str(run), "--shift", "2.5", "--preset", "repa"]).samples.settings.shift == 2.5
    for wrong in ("0", "101", "automatic"):
        with pytest.raises(UserError, match=rf"^--shift {wrong}: "):
            sample.parse([str(run), "--shift", wrong])
