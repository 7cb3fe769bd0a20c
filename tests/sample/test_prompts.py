"""Samples from prompts: which states the model is given, what a picture and a set say of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from st_fast import kernels
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.data.text import open_text, read_text_manifest
from st_fast.evaluate import __main__ as evaluate
from st_fast.evaluate.clip_score import load_clip
from st_fast.model import build
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load, to_toml
from st_fast.sample import __main__ as sample
from st_fast.sample import previews, prompts
from st_fast.sample.captioned import GAP, LINES, captioned_grid, wrapped
from st_fast.sample.previews import read_record
from tests import tiny_text
from tests.evaluate.test_clip_score import write_clip
from tests.sample.tiny_run import RECIPE

pytestmark = pytest.mark.usefixtures("one_thread")


class Encoder:
    """Stands for the encoder that made the tiny set's states; notes what it was given."""

    name, hash, length, width, mask = tiny_text.ENCODER, "0" * 64, tiny_text.LENGTH, tiny_text.WIDTH, True

    def __init__(self, hash: str = "0" * 64) -> None:
        self.hash, self.read, self.given = hash, list[str](), list[tuple[object, ...]]()

    def loaded(self, *arguments: object) -> Encoder:
        self.given.append(arguments)
        return self

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.read += texts
        return tiny_text.states_of(texts).float() * (1 + 2**-13)  # float32, as of an encoder; stored rounded

    def tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 2 for text in texts]


@pytest.fixture
def encoder(monkeypatch) -> Encoder:
    found = Encoder()
    monkeypatch.setattr(prompts, "load_text_encoder", found.loaded)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    moments = torch.zeros(tiny_text.IMAGES, 6, 8, 8).half()
    manifest = Manifest(0, (6, 8, 8), "float16", 20.0, VaeInfo("pixels"), "nothing", 1)
    write_shards(folder / "data", [(moments, torch.zeros(len(moments), dtype=torch.int64))], manifest)
    (folder / "data" / "captions.jsonl").write_bytes(tiny_text.captions_bytes(tiny_text.CAPTIONS))
    tiny_text.write_states(folder / "data")
    model = f'network = "mmdit"\ntext_width = {tiny_text.WIDTH}\ntext_length = {tiny_text.LENGTH}'
    text = RECIPE.replace("num_classes = 5", model).format(data=folder / "data", out=folder / "run")
    (folder / "recipe.toml").write_text(text)
    recipe = load(folder / "recipe.toml")
    (folder / "run").mkdir()
    (folder / "run" / "recipe.toml").write_text(to_toml(recipe))
    network = build(recipe.model, kernels.select({}, torch.device("cpu")), 0)
    generator = torch.Generator().manual_seed(0)
    state = {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in network.state_dict().items()}
    state["null_context"] = tiny_text.states_of([""]).float()  # as training leaves it
    meta = {"architecture": recipe.model.architecture()}
    checkpoint.save(folder / "run" / "plain" / "checkpoints", 10, {"model": state, "ema": state}, meta)
    return folder / "run"


def drawn(run: Path, out: Path, *options: str) -> np.ndarray:
    """(n, H, W, 3): a set's images."""
    sample.main([str(run), "--out", str(out), "--npz", "--batch-size", "3", *options])
    return np.load(out / "samples.npz")["arr_0"]


def test_each_sample_follows_its_prompt_wherever_its_states_come_from(run, encoder, tmp_path, capsys):
    captions = [line[0] for line in tiny_text.CAPTIONS]
    stored = drawn(run, tmp_path / "stored", "-n", "16")
    assert not encoder.read, "captions of the data need no encoder"
    (tmp_path / "p.txt").write_text("\n\n".join(captions[3:6]) + "\n")
    some = drawn(run, tmp_path / "some", "--prompts", str(tmp_path / "p.txt"), "-n", "16")
    assert encoder.read == ["", *captions[3:6]], "each prompt is read once, and none to compare with the run's"
    # Sample 4 has the second of three prompts here, and the fifth of sixteen there: the same caption and noise.
    assert np.array_equal(some[4], stored[4]) and not np.array_equal(some[7], stored[7])
    settings = json.loads((tmp_path / "some" / "sample.json").read_text())
    assert settings["prompts"] == captions[3:6] and settings["negative"] is None
    assert "prompts in turn, row by row: a picture, number 3" in capsys.readouterr().out


def test_a_negative_prompt_takes_the_place_of_none(run, encoder, tmp_path):
    prompt = ("--prompt", "a picture, number 2", "-n", "3")
    plain, none, other = (
        drawn(run, tmp_path / str(i), *prompt, *more)
        for i, more in enumerate(((), ("--negative", "number 1, once more (0)"), ("--negative", "number 9")))
    )
    assert np.array_equal(plain, drawn(run, tmp_path / "empty", *prompt, "--negative", "")), "the empty one is none"
    assert not np.array_equal(plain, none) and not np.array_equal(none, other)
    unguided = [
        drawn(run, tmp_path / f"u{i}", *prompt, "--cfg-scale", "1", *more)
        for i, more in enumerate(((), ("--negative", "x")))
    ]
    assert np.array_equal(*unguided)


def test_a_picture_has_the_prompts_and_as_many_samples_of_each(run, encoder, tmp_path, capsys):
    out = tmp_path / "a.png"
    sample.main([str(run), "--prompt", "one thing", "--prompt", "שלום, مرحبا, \U0001f3fd \u202e", "--out", str(out)])
    record = read_record(out)
    assert record is not None and record["num"] == 10 and len(record["prompts"]) == 2
    sample.main([str(run), "--prompt", "a very long prompt of many words", "--out", str(tmp_path / "b.png")])
    assert "1 of 1 prompts have more than 4 tokens, cut: a very long" in capsys.readouterr().out


def test_states_are_those_of_the_numbers_asked_for_and_only_some_are_kept(encoder):
    texts = [f"number {i}" for i in range(1_200)]
    found = prompts.EncodedPrompts(texts, encoder, torch.device("cpu"), stored=torch.float16)
    for numbers, read in (
        ([7, 2, 7, 5], 3), ([2, 3], 1), ([*range(1_006, -1, -1)], 1_003), ([1_007, 5], 1), ([1_008, 5], 1),
        ([1_009, 5], 2),  # beside 1,009 of them, more than a thousand and four times two
        ([5, 1_100, 5], 1),
    ):  # fmt: skip
        before = len(encoder.read)
        expected = tiny_text.states_of([texts[number] for number in numbers]).float()
        assert torch.equal(found.states(torch.tensor(numbers)), expected)
        assert len(encoder.read) - before == read
    assert found.negative(3) is None


def test_prompts_are_read_as_the_datas_captions_were_by_the_encoder_where_it_lies_now(encoder, tmp_path):
    data, said = tiny_text.make_data(tmp_path / "data"), list[str]()
    manifest = read_text_manifest(data, "")
    cpu, mask, negated = torch.device("cpu"), not manifest.mask, "no thing of more than four words " * 3
    for place, asked in (("", tiny_text.ENCODER), ("/elsewhere/tiny", "/elsewhere/tiny")):
        texts = ["one", "two words"]
        found = prompts.encoded_prompts(texts, replace(manifest, mask=mask), cpu, said.append, negated, place)
        assert encoder.given[-1] == (asked, cpu, torch.float32, tiny_text.LENGTH, mask)
    negative = found.negative(2)
    assert negative is not None and torch.equal(negative[1], tiny_text.states_of([negated])[0].float())
    assert said[-1].endswith(f"1 of 3 prompts have more than 4 tokens, cut: {negated[:60]}…")


@pytest.mark.parametrize("flip", [False, True])
def test_stored_states_are_those_of_the_captions_they_stand_with(flip, tmp_path):
    data = tiny_text.make_data(tmp_path / "data", flip)
    stored = open_text(data, "", records := open_data(data))
    found = prompts.stored_prompts(data, stored, 5, torch.device("cpu"))
    assert list(found.texts) == [tiny_text.CAPTIONS[i][0] for i in (0, 3, 7, 11, 15)]
    assert torch.equal(found.states(torch.tensor([4, 1, 4])), tiny_text.states_of(found.texts)[[4, 1, 4]].float())
    ours = stored.manifest
    prompts.check_same_encoder(stored, replace(ours, encoder="elsewhere/tiny"), data)
    for other in ({"hash": "1" * 64}, {"shape": (1, 5, 6)}, {"shape": (1, 4, 7)}, {"mask": not ours.mask}):
        with pytest.raises(UserError, match=r"states of 'none/tiny-encoder'.*, 4 tokens, mask True; those of"):
            prompts.check_same_encoder(stored, replace(ours, **other), data)
    records.close()


def test_null_bytes_of_prompts_are_left_out_and_too_many_refused(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_bytes(b"\n a\0b \r\n\xff\n \0 c")
    assert prompts.read_prompts(tmp_path / "p.txt") == ["ab", "\ufffd", "c"]
    monkeypatch.setattr(prompts, "PROMPTS_MOST", 3)
    assert prompts.checked_prompts(["a"] * 3, "here") == ["a"] * 3
    with pytest.raises(UserError, match="here: 4 prompts, at most 3"):
        prompts.checked_prompts(["a"] * 4, "here")
    monkeypatch.setattr(prompts, "CAPTION_MOST", 5)
    assert prompts.checked_prompts(["a", "abcde"], "here") == ["a", "abcde"]
    with pytest.raises(UserError, match=r"here: 'abcdef'…: 6 characters, at most 5"):
        prompts.checked_prompts(["abcdef", "a"], "here")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompts", "EMPTY"), "no prompt in it"),
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--prompt", "x" * (2**20 + 1)), "1,048,577 characters"),
        (("--prompt", "x", "--labels", "1"), "--labels 1"),
    ],
)
def test_prompts_that_are_none_are_refused_in_one_line(options, words, run, encoder, tmp_path):
    (tmp_path / "EMPTY").write_text(" \n\n")
    given = [str(tmp_path / "EMPTY") if one == "EMPTY" else one for one in options]
    with pytest.raises(UserError, match=words) as raised:
        sample.main([str(run), "--out", str(tmp_path / "x.png"), *given])
    assert "\n" not in str(raised.value)


def test_an_encoder_that_is_not_where_its_name_says_is_found_by_the_recipe_or_asked_for(run, tmp_path, monkeypatch):
    asked = list[str]()

    def load(name, *arguments):
        asked.append(name)
        if name != "elsewhere":
            raise UserError(f"encoder {name!r}: no folder")
        return Encoder()

    monkeypatch.setattr(prompts, "load_text_encoder", load)
    with pytest.raises(
        UserError, match=r": no folder; --text-encoder FOLDER, or sample\.text_encoder of a recipe, says"
    ):
        drawn(run, tmp_path / "no", "--prompt", "x")
    with pytest.raises(UserError, match=r"'wrong': no folder$"):
        drawn(run, tmp_path / "no", "--prompt", "x", "--text-encoder", "wrong")
    first = drawn(run, tmp_path / "a", "--prompt", "x", "-n", "2", "--text-encoder", "elsewhere")
    recipe = run / "recipe.toml"
    text = recipe.read_text()
    try:
        recipe.write_text(text.replace('text_encoder = ""', 'text_encoder = "elsewhere"'))
        assert np.array_equal(first, drawn(run, tmp_path / "b", "--prompt", "x", "-n", "2"))
    finally:
        recipe.write_text(text)
    records = [(tmp_path / name / "sample.json").read_text() for name in "ab"]
    assert asked == [tiny_text.ENCODER, "wrong", "elsewhere", "elsewhere"] and records[0] == records[1]


def test_without_inception_samples_of_texts_are_scored_by_clip_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.inception, "find_weights", lambda file: None)
    with pytest.raises(UserError, match=r"no Inception weights: pass --inception FILE .*, or --clip MODEL$"):
        evaluate.main([str(run), "-n", "5"])
    with pytest.raises(UserError, match="--clip 'nowhere/at all'"):
        evaluate.main([str(run), "-n", "5", "--clip", "nowhere/at all"])
    assert not list(run.rglob("samples.npz")), "a CLIP that can't be had is refused before anything is drawn"
    evaluate.main([str(run), "-n", "5", "--clip", str(clip := write_clip(tmp_path))])
    (file,) = run.rglob("metrics.json")
    record = json.loads(file.read_text())
    images = torch.from_numpy(np.load(file.with_name("samples.npz"))["arr_0"].transpose(0, 3, 1, 2).copy())
    first = [line[0] for line in tiny_text.CAPTIONS]
    texts = [first[i] for i in prompts.spaced(5, len(first)).tolist()]
    scorer = load_clip(str(clip), torch.device("cpu"))
    assert record["metrics"] == {"clip_score": pytest.approx(float(scorer(images, texts).mean()), rel=1e-5)}
    assert record["protocol"]["clip_sha256"] == record["protocol"]["weights_sha256"] == scorer.hash


def test_another_encoder_than_the_datas_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, "load_text_encoder", lambda *arguments: Encoder("1" * 64))
    with pytest.raises(UserError, match="other weights"):
        sample.main([str(run), "--prompt", "x", "--out", str(tmp_path / "x.png")])


def test_states_that_are_not_what_the_run_was_trained_on_are_refused_wherever_they_come_from(
    run, encoder, monkeypatch, tmp_path
):
    kept, out = tiny_text.states_of, ["--out", str(tmp_path / "x.png")]
    monkeypatch.setattr(tiny_text, "states_of", lambda texts: 1.2 * kept(texts))
    other = tiny_text.make_data(tmp_path / "other")  # what the manifest says is the same
    for given in (["--captions", str(other)], ["--prompt", "x"]):
        with pytest.raises(UserError, match=r"empty caption are not those that .*run was trained on") as told:
            sample.main([str(run), *out, *given])
        assert "\n" not in str(told.value)


def test_captions_of_another_data_folder_are_drawn_if_the_same_encoder_read_them(run, tmp_path):
    other = tiny_text.make_data(tmp_path / "other")
    sample.main([str(run), "--captions", str(other), "--out", str(tmp_path / "x.png"), "-n", "3"])
    record = read_record(tmp_path / "x.png")
    assert record is not None
    assert record["prompts"] == [tiny_text.CAPTIONS[i][0] for i in (0, 7, 15)]
    again = [str(run), "--captions", str(other), "--out", str(tmp_path / "y.png"), "-n", "3"]
    tiny_text.write_states(other, mask=False)
    with pytest.raises(UserError, match="mask False; those of"):
        sample.main(again)
    tiny_text.write_states(other)
    (manifest,) = other.glob("text/*/manifest.json")
    whole = manifest.read_text()
    nameless = whole.replace("0" * 64, "")  # without a hash, as states in U-ViT's layout come: the name decides
    for changed, words in (
        (whole.replace("0" * 64, "1" * 64), r"SHA-256 111111111111\), 4 tokens, .*SHA-256 000000000000"),
        (nameless.replace("none/tiny-encoder", "none/another"), "of 'none/another', 4 tokens"),
    ):
        manifest.write_text(changed)
        with pytest.raises(UserError, match=words):
            sample.main(again)
    manifest.write_text(nameless)
    sample.main(again)


def test_a_run_on_classes_takes_no_prompt(tmp_path):
    from tests.sample.tiny_run import make_run

    classes = str(make_run(tmp_path))
    for flag in ("--prompt", "--negative", "--text-encoder", "--captions"):
        with pytest.raises(UserError, match=f"{flag}: .*draws classes"):
            sample.main([classes, flag, "x"])


@pytest.mark.parametrize(
    ("texts", "images", "columns"), [(3, 9, 3), (3, 3, 10), (15, 30, 5), (20, 40, 10), (13, 26, 10), (15, 15, 10)]
)
def test_samples_of_a_prompt_stand_in_one_column_where_they_can(texts, images, columns, monkeypatch):
    asked = list[int]()
    monkeypatch.setattr(previews, "captioned_grid", lambda images, captions, columns: asked.append(columns))
    drawn = prompts.Prompts.__new__(prompts.StoredPrompts)
    drawn.texts = tuple(map(str, range(texts)))
    previews.sheet(torch.zeros(images, 1, 2, 2), [i % texts for i in range(images)], drawn)
    assert asked == [columns]


def test_captions_stand_under_their_pictures_and_never_break_the_sheet():
    images = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    texts = ["short", "a\0b\nc \u202e مرحبا " * 30, "x" * 5_000]
    sheet = captioned_grid(images, texts, 2)
    assert sheet.dtype == torch.uint8 and sheet.shape[2] == 4
    black = (sheet == torch.tensor([0, 0, 0, 255])).all(-1)
    assert black[:130, :130].sum() >= 120 * 120, "the picture"
    assert all(len(wrapped(text, 120)) <= LINES for text in texts)
    assert wrapped("short", 120) == ["short"] and wrapped("", 120) == [""]


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16"])
def test_prompts_come_as_captions_do_whatever_wrote_them(form, run, encoder, tmp_path):
    (tmp_path / "p.txt").write_bytes("number 1\r\n \r\ntwo\u2028 lines\0 \r\n".encode(form))
    prompts = ["--prompt", " a\0 fox", "--prompt", "half \udcff", "--negative", "x\0\udc80"]
    out = tmp_path / "set"
    sample.main([str(run), "--prompts", str(tmp_path / "p.txt"), *prompts, "-n", "4", "--npz", "--out", str(out)])
    settings = json.loads((out / "sample.json").read_text())
    assert settings["prompts"] == ["a fox", "half ?", "number 1", "two\u2028 lines"] and settings["negative"] == "x?"
    assert set(encoder.read) == {*settings["prompts"], "x?", ""}


def test_an_option_that_would_be_passed_over_is_refused(run, encoder, tmp_path):
    other, out = tiny_text.make_data(tmp_path / "other"), ["--out", str(tmp_path / "x.png")]
    (tmp_path / "p.txt").write_text("one")
    for given in (["--prompt", "x"], ["--prompts", str(tmp_path / "p.txt")]):
        with pytest.raises(UserError, match=f"--captions .*: with {given[0]} these are not drawn"):
            sample.main([str(run), *out, "--captions", str(other), *given])
    with pytest.raises(UserError, match="--text-encoder somewhere: captions of the data are drawn"):
        sample.main([str(run), *out, "--text-encoder", "somewhere"])


def test_captions_without_words_are_told_apart_by_their_states_and_keep_them_beside_a_negative(run, encoder, tmp_path):
    """As U-ViT's layout has them, where no file has the words."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        tiny_text.make_data(folder)
        lines = [["" for _ in line] for line in tiny_text.CAPTIONS]
        (folder / "captions.jsonl").write_bytes(tiny_text.captions_bytes(lines))
        tiny_text.write_states(folder, number=number)
    plain, other = (drawn(run, tmp_path / f"{f.name}1", "--captions", str(f), "-n", "4") for f in folders)
    with pytest.raises(UserError, match=r"holds samples drawn with states .* \(now"):
        drawn(run, tmp_path / "a1", "--captions", str(folders[1]), "-n", "4")
    assert not np.array_equal(plain, other)
    away = drawn(run, tmp_path / "a2", "--captions", str(folders[0]), "-n", "4", "--negative", "")
    assert encoder.read == [""] and np.array_equal(away, plain)


def test_every_caption_stands_under_its_own_picture_row_by_row():
    shades = torch.arange(18).mul(12).view(3, 3, 1, 2)  # of the left and the right half, by colour
    images = shades.repeat_interleave(64, 2).repeat_interleave(32, 3).byte()
    texts = ["i", "m " * 40, "m m m"]
    sheet, side, below = captioned_grid(images, texts, 2).int(), 128, 3 * 14
    ink, tops = [], (GAP, GAP + side + GAP + LINES * 14 + GAP)
    for number, (left, top) in enumerate(((GAP, tops[0]), (2 * GAP + side, tops[0]), (GAP, tops[1]))):
        picture = sheet[top : top + side, left : left + side]
        assert torch.equal(picture[1, [1, -2], :3], shades[number, :, 0].T.int())
        assert torch.equal(picture[-2, [1, -2], :3], shades[number, :, 0].T.int()) and (picture[..., 3] == 255).all()
        ink.append(int(sheet[top + side : top + side + below, left : left + side, 3].sum()))
    assert 0 < 3 * ink[0] < ink[2] and 5 * ink[2] < ink[1] and (sheet[tops[1] :, 2 * GAP + side :, 3] == 0).all()
