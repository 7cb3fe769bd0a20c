"""`--buckets`: every image in the folder of the nearest aspect ratio, cropped as Pillow alone would crop it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.data.buckets import BucketSet
from st_fast.data.images import center_crop, image_sides
from st_fast.data.manifest import read_manifest
from st_fast.data.shards import open_data
from st_fast.data.sources import open_source
from st_fast.model.vae import load_vae, vae_hash
from st_fast.prepare import job
from st_fast.prepare.buckets import AUTO, all_sides, assign, bucket_sides, read_ratios

from .conftest import encoded, picture, run

PIXELS = ["--size", "24", "--vae", "pixels", "--shard-size", "2", "--device", "cpu", "--dtype", "float32"]
BUCKETS = ["--buckets", "1:1,4:3,3:4"]
SIDES = {"24x24": (24, 24), "20x28": (20, 28), "28x20": (28, 20)}
"""1 : 1.4 is the nearest that even sides of 0.85 to 1 times 24 x 24 pixels have to 4 : 3."""
SIZES = [(60, 60), (90, 61), (50, 80), (33, 33), (120, 40), (31, 30), (45, 66), (200, 150), (70, 52)]
"""Width and height of the images."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nine images in two classes; the last is kept lying on its side, which its EXIF says."""
    folder = tmp_path / "images"
    for number, size in enumerate(SIZES):
        path = folder / ("ab"[number % 2]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, exif = picture(number, size), Image.Exif()
        if number == len(SIZES) - 1:
            exif[0x0112] = 6
        image.save(path, exif=exif)
    return folder


def by_pillow(path: Path, height: int, width: int) -> np.ndarray:
    """uint8 (3, H, W): upright, halved by box filter, bicubic, the middle; written down anew."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if image.width * height >= image.height * width:  # too wide: the height decides
        size = round(image.width * height / image.height), height
    else:
        size = width, round(image.height * width / image.width)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nearest(path: Path) -> str:
    width, height = ImageOps.exif_transpose(Image.open(path)).size
    return min(SIDES, key=lambda name: abs(math.log(width / height) - math.log(SIDES[name][1] / SIDES[name][0])))


def in_order(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"), key=lambda path: path.as_posix())


def test_each_image_is_in_the_nearest_bucket_and_cropped_as_pillow_alone_does(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, *PIXELS, *BUCKETS, "--flip")
    records, files = open_data(out), in_order(images)
    assert isinstance(records, BucketSet) and list(records.sets) == list(SIDES)
    assert {nearest(path) for path in files} == set(SIDES) and nearest(images / "a" / "8.png") == "28x20"
    for name, part in records.sets.items():
        own = [path for path in files if nearest(path) == name]
        moments, labels = part.gather(np.arange(len(part)))
        assert labels.tolist() == [int(path.parent.name == "b") for path in own for _ in "12"]
        pixels = np.stack([by_pillow(path, *SIDES[name]) for path in own])
        found = moments[:, :3].numpy()
        for view, expected in ((found[::2], pixels), (found[1::2], pixels[..., ::-1])):
            np.testing.assert_allclose((view + 1) * 127.5, expected, atol=1e-3)
        assert part.manifest.source.endswith(f"centre crop {name if name != '24x24' else 24}")
        assert part.manifest.flip and part.manifest.class_names == ("a", "b")


def test_an_interrupted_command_goes_on_and_ends_with_the_same_files(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, tmp_path / "whole", *PIXELS, *BUCKETS)
    original, made = job.write_shard, []

    def limited(path: Path, *rest: object) -> object:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path)
        return original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(job, "write_shard", limited)
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "out", *PIXELS, *BUCKETS)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "buckets.json").exists()
    with pytest.raises(UserError, match=r"no manifest\.json in it"):
        open_data(tmp_path / "out")
    run(images, tmp_path / "out", *PIXELS, *BUCKETS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_several_processes_share_every_bucket_and_the_last_one_writes_the_index(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(images, tmp_path / "one", *PIXELS, *BUCKETS)
    capsys.readouterr()
    for rank in (1, 0):
        assert not (tmp_path / "two" / "buckets.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(images, tmp_path / "two", *PIXELS, *BUCKETS)
    assert "train: python -m st_fast.train recipes/sit_s.toml" in capsys.readouterr().out
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_images_of_all_buckets_together_are_at_most_max_bad(
    processes: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {name: [path for path in in_order(images) if nearest(path) == name] for name in SIDES}
    bad = [paths[-1] for paths in groups.values() if len(paths) > 1]
    assert len(bad) >= 2, "in as many buckets"
    for path in bad:
        path.write_bytes(path.read_bytes()[:-40])
    (images / "a" / "notes.pdf").write_bytes(b"no image")

    def prepare(max_bad: int) -> None:
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            run(images, tmp_path / "out", *PIXELS, *BUCKETS, "--max-bad", max_bad)

    with pytest.raises(UserError, match=rf"{len(bad)} images can't be used.*, --max-bad allows {len(bad) - 1}"):
        prepare(len(bad) - 1)
    assert not (tmp_path / "out" / "buckets.json").exists()
    prepare(len(bad))
    (tmp_path / "out" / "buckets.json").unlink()
    with pytest.raises(UserError, match=rf"out: {len(bad)} images can't be used, --max-bad allows {len(bad) - 1}$"):
        prepare(len(bad) - 1)
    prepare(len(bad))
    assert len(open_data(tmp_path / "out")) == len(in_order(images)) - len(bad)
    skipped = [name for table in (tmp_path / "out").rglob("skipped.json") for name in json.loads(table.read_text())]
    assert sorted(skipped) == sorted(["a/notes.pdf", *(path.relative_to(images).as_posix() for path in bad)])


def test_a_finished_folder_says_so_and_verify_and_stats_read_all_of_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(images, out, *PIXELS, *BUCKETS)
    assert "none in" not in capsys.readouterr().out
    run(images, out, *PIXELS, *BUCKETS)
    run("--verify", out)
    run("--stats", out)
    said = capsys.readouterr().out
    assert "complete already" in said and "data: 9 records in" in said
    for name in SIDES:
        assert f"{name}: {len(open_data(out / name)):,} records, " in said
        assert Image.open(out / name / "stats.png").width >= 480


def test_a_bucket_alone_is_decoded_by_the_vae_that_lies_beside_it(
    images: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(images, out, "--size", "48", "--vae", str(tiny_vae), "--device", "cpu", "--buckets", "1:1,4:3")
    names = [path.parent.name for path in sorted(out.glob("*/manifest.json"))]
    assert len(names) == 2
    for name in names:
        monkeypatch.chdir(out / name)
        for folder in (out / name, Path()):
            made = read_manifest(folder).vae
            assert vae_hash(load_vae(made.source(folder))) == made.hash
    (out / "buckets.json").unlink()
    with pytest.raises(BadFile, match="missing; the VAE"):
        made.source(out / name)


def test_captions_lie_in_the_order_of_the_records(images: Path, tmp_path: Path) -> None:
    (images / "a" / "broken.png").write_bytes(encoded(picture(3, (40, 40)))[:60])
    for path in images.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"picture {path.stem}")
    out = tmp_path / "out"
    run(images, out, *PIXELS, *BUCKETS, "--captions", "auto")
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    expected = [
        path.stem for name in SIDES for path in in_order(images) if path.stem != "broken" and nearest(path) == name
    ]
    assert lines == [[f"picture {stem}"] for stem in expected] and len(lines) == len(open_data(out)) == 9
    run(images, out, *PIXELS, *BUCKETS, "--captions", "auto")


def test_one_size_that_is_no_square_is_height_times_width(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out", "--size", "20x28", *PIXELS[2:])
    records = open_data(tmp_path / "out")
    assert records.manifest.shape == (3, 20, 28) and records.manifest.source.endswith("upright, centre crop 20x28")
    moments, _ = records.gather(np.arange(9))
    pixels = np.stack([by_pillow(path, 20, 28) for path in in_order(images)])
    np.testing.assert_allclose((moments[:, :3].numpy() + 1) * 127.5, pixels, atol=1e-3)
    run(images, tmp_path / "out", "--size", "20x28", *PIXELS[2:])
    with pytest.raises(UserError, match=r"complete, but made with size \[20, 28\] \(now \[28, 20\]\)"):
        run(images, tmp_path / "out", "--size", "28x20", *PIXELS[2:])


def test_a_square_is_cropped_to_the_same_bits_by_either_way_of_saying_so() -> None:
    for number, size in enumerate(SIZES):
        image = picture(number, size)
        assert np.array_equal(center_crop(image, 24), center_crop(image, (24, 24)))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_sides_by_the_header_are_those_of_the_upright_image(orientation: int, kind: str) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture(1, (21, 34)).save(file, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    assert image_sides(file.getvalue()) == (upright.height, upright.width)


@pytest.mark.parametrize(("size", "unit"), [(256, 16), (512, 16), (256, 64), (100, 16), (1024, 64), (24, 2)])
def test_sides_are_the_best_multiples_of_the_unit_below_the_squares_area(size: int, unit: int) -> None:
    for ratio in AUTO:
        wide, high = map(int, ratio.split(":"))
        every = [
            (abs(math.log(w / h / (wide / high))) - math.log(h * w / size**2), h, w)
            for h in range(unit, 4 * size, unit)
            for w in range(unit, 4 * size, unit)
            if 0.85 * size**2 <= h * w <= size**2 and 0.8 <= w / h / (wide / high) <= 1.25
        ]
        if not every:
            with pytest.raises(UserError, match="take a larger --size"):
                bucket_sides(ratio, size, unit)
            continue
        height, width = bucket_sides(ratio, size, unit)
        cost = abs(math.log(width / height / (wide / high))) - math.log(height * width / size**2)
        assert height % unit == width % unit == 0 and 0.85 * size**2 <= height * width <= size**2
        assert cost == pytest.approx(min(every)[0], abs=1e-12)


def test_the_usual_ratios_have_the_usual_sides() -> None:
    expected = [(256, 256), (224, 288), (288, 224), (208, 304), (304, 208), (192, 336), (336, 192)]
    assert all_sides(AUTO, 256, 16) == expected and read_ratios("auto") == AUTO


def test_of_auto_a_bucket_that_another_is_already_is_left_out() -> None:
    found = all_sides(AUTO, 32, 4)  # 16:9 would be 24x40, as 3:2 is already
    assert found == [(32, 32), (28, 36), (36, 28), (24, 40), (40, 24)]


def test_ratios_that_make_no_buckets_are_refused_before_a_small_vae_is_trained(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("st_fast.prepare.vaes.train_vae", lambda *_: pytest.fail("a VAE is trained"))
    with pytest.raises(UserError, match="1:1 and 25:24 would both be 32x32 at --size 32"):
        run(images, tmp_path / "out", "--size", 32, "--vae", "small", "--device", "cpu", "--buckets", "1:1,25:24")
    assert not (tmp_path / "out").exists()


REFUSED = [
    (["--buckets", "4-3"], r"--buckets '4-3': '4-3': auto, or WIDTH:HEIGHT"),
    (["--buckets", "0:1"], r"'0:1'"),
    (["--buckets", ",".join(["1:1"] * 65)], "65 ratios; at most 64"),
    (["--buckets", "1:1,25:24"], "1:1 and 25:24 would both be 24x24 at --size 24: take one"),
    (["--buckets", "1:400"], "no sides that are multiples of 2"),
    (["--buckets", "1:1", "--size", "24x28"], "--buckets takes one side"),
    (["--size", "24x28x3"], "a side, or HEIGHTxWIDTH, is needed"),
    (["--size", "24x0"], "0: at least 1"),
    (["--size", "x24"], "x24: a side, or HEIGHTxWIDTH, is needed"),
    (["--size", "24x"], "24x: a side, or HEIGHTxWIDTH, is needed"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_ratios_and_sizes_that_make_no_sense_are_one_line(
    options: list[str], words: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run(images, tmp_path / "out", *PIXELS, *options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_folder_begun_otherwise_is_refused(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "plain", *PIXELS)
    with pytest.raises(UserError, match="holds latents of one shape, without --buckets"):
        run(images, tmp_path / "plain", *PIXELS, *BUCKETS)
    run(images, tmp_path / "out", *PIXELS, *BUCKETS)
    with pytest.raises(UserError, match="begun with --buckets"):
        run(images, tmp_path / "out", *PIXELS)
    with pytest.raises(UserError, match=r'made with buckets \["1:1", "4:3", "3:4"\] \(now \["1:1", "4:3"\]\)'):
        run(images, tmp_path / "out", *PIXELS, "--buckets", "1:1,4:3")
    with pytest.raises(UserError, match="made with VAE pixels"):
        run(images, tmp_path / "out", *PIXELS, *BUCKETS, "--vae", "pixels-gray")
    with pytest.raises(UserError, match=r"latents of several shapes; REPA's layout takes one: name one of"):
        run("--to-repa", tmp_path / "out", tmp_path / "repa")


def stopped(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """From now on, until `undo`, the command is interrupted where it calls that function."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(what, end)


@pytest.mark.parametrize("buckets", [[], BUCKETS])
def test_work_begun_on_pixels_is_not_continued_in_gray(
    buckets: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped(patch, "st_fast.prepare.job._check_skipped")  # one shard is there, and its note
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "out", *PIXELS, *buckets)
    with pytest.raises(UserError, match=r"begun with channels 3 \(now 1\)"):
        run(images, tmp_path / "out", *PIXELS, *buckets, "--vae", "pixels-gray")
    run(images, tmp_path / "out", *PIXELS, *buckets)
    open_data(tmp_path / "out", verify=True)


def test_work_begun_with_buckets_is_continued_with_the_same_sides_alone(
    images: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped(patch, "st_fast.prepare.bucket_command.assigned")  # job.json alone is there
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "out", *PIXELS, "--size", "64", "--buckets", "1:1,3:2")
    with pytest.raises(UserError, match="begun with --buckets"):
        run(images, tmp_path / "out", *PIXELS, "--size", "64")
    with pytest.raises(UserError, match=r"begun with sides \[\[64, 64\], \[52, 78\]\] \(now \[\[64, 64\], "):
        run(images, tmp_path / "out", *PIXELS, "--size", "64", "--buckets", "1:1,3:2", "--vae", tiny_vae)


def test_what_says_which_image_is_where_is_checked(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, *PIXELS, *BUCKETS)
    (out / "buckets.json").unlink()
    for content in (b"no array", np.zeros(8, np.uint8), np.full(9, 3, np.uint8), np.zeros(9, np.int64)):
        file = io.BytesIO()
        file.write(content) if isinstance(content, bytes) else np.save(file, content)
        (out / "assigned.npy").write_bytes(file.getvalue())
        with pytest.raises(BadFile, match=r"assigned\.npy: .*remove it, and the same command makes it again"):
            run(images, out, *PIXELS, *BUCKETS)
    (out / "assigned.npy").unlink()
    run(images, out, *PIXELS, *BUCKETS)
    assert len(open_data(out)) == 9


def test_an_image_that_cannot_be_read_goes_where_most_are(images: Path) -> None:
    (images / "a" / "00.png").write_bytes(b"no image")
    source = open_source(images)
    found = assign(source, list(SIDES.values()))
    most = int(np.bincount(found[1:]).argmax())
    assert found[0] == most and found.dtype == np.uint8 and len(found) == 10
