"""Whatever happens to a recipe's text, it loads or is refused in one line, at once."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from st_fast.recipe import Recipe, RecipeError, load, to_toml
from tests.fuzz import blocks, watched

HOSTILE = [
    *("nan", "inf", "-1", "0", "true", '""', "[]", "{}", "[[1]]", "1e400", "-0.0", "9" * 30, "0x" + "f" * 90),
    *("[0.9, 0.1]", '"../.."', '"a\\u0000b"', "2024-01-01", "12:00:00", "'''x\ny'''", "[nan, 1]", "{a = {b = 1}}"),
    *('"SiT-B/2"', '"\\U0001F600"', ".5", "[1, 2, 3]", '"self_transcendence"', '"none"', "1_0"),
]
PLAUSIBLE = {
    "int": ["1", "2", "3", "4", "6", "8", "12", "16", "64", "96", "100", "1_000", "0x10"],
    "float": ["0.1", "0.5", "1", "1.0", "0.0", "1e-3", "0.999", "2.5", "30", "0.3"],
    "str": [
        '"auto"',
        '"align"',
        '"x/y"',
        '"digits"',
        '"cosine"',
        '"ema"',
        '"off"',
        '"heun"',
        '"sample_mean"',
        "'none'",
    ],
    "list": ["[0.0, 1.0]", "[0, 1]", "[0.2, 0.3]", "[0.5, 0.5]", "[0.9, 0.95]"],
    "bool": ["true", "false"],
}


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    """A few bytes replaced, removed, inserted or moved, or the end cut off."""
    spoilt = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(spoilt) or 1)
        kind = random.randrange(5)
        if kind == 0:
            spoilt[at : at + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            del spoilt[at : at + random.randint(1, 20)]
        elif kind == 2:
            spoilt[at:at] = random.choice([b"[", b"]", b'"', b"=", b".", b"\n", b"\r", b"\0", b"#", b"[[stage]]\n"])
        elif kind == 3:
            start = random.randrange(len(spoilt) or 1)
            spoilt[at:at] = spoilt[start : start + random.randint(1, 60)]
        else:
            del spoilt[at:]
    return bytes(spoilt)


def mutate_values(content: bytes, random: random.Random) -> bytes:
    """One or two values replaced, most by others of their type, or a key misspelt, split or written over another."""
    lines = content.decode().splitlines()
    for _ in range(random.randint(1, 2)):
        at = random.choice([i for i, line in enumerate(lines) if " = " in line])
        key, _, value = lines[at].partition(" = ")
        plausible = f"{key} = {random.choice(PLAUSIBLE[kind_of(value)])}"
        hostile = f"{key} = {random.choice(HOSTILE)}"
        other = random.choice([line for line in lines if " = " in line])
        lines[at] = random.choice([*[plausible] * 6, hostile, hostile, f"{key[:-1]} = {value}", f"{key}.x = 1", other])
    return "\n".join(lines).encode()


def kind_of(value: str) -> str:
    """What kind of TOML value a recipe's line holds, by its first character or its point."""
    by_first = {'"': "str", "'": "str", "[": "list", "t": "bool", "f": "bool"}
    return by_first.get(value[:1], "float" if "." in value or "e" in value else "int")


@pytest.mark.parametrize("block", blocks(10, 67))
def test_a_mutated_recipe_loads_or_is_refused_in_one_line_at_once(block: int, small: Path) -> None:
    originals = [small.read_bytes(), to_toml(load(small)).encode()]
    for seed in range(30 * block, 30 * block + 30):
        rng = random.Random(seed)
        mutate = mutate_bytes if seed % 2 else mutate_values
        small.write_bytes(mutate(rng.choice(originals), rng))
        start = time.process_time()
        with watched("recipe", small.stat().st_size):
            try:
                assert isinstance(load(small, ranks=rng.choice([1, 3, 8])), Recipe)
            except RecipeError as error:
                assert re.match(re.escape(str(small)), str(error)), f"seed {seed}: the file is not named: {error}"
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 1_000, f"seed {seed}"
                raise
        assert time.process_time() - start < 1, f"seed {seed}"


def test_the_mutations_reach_both_outcomes_and_many_checks(small: Path) -> None:
    original, loaded, refused = to_toml(load(small)).encode(), 0, set()
    for seed in range(300):
        rng = random.Random(seed)
        small.write_bytes((mutate_bytes if seed % 2 else mutate_values)(original, rng))
        try:
            load(small)
            loaded += 1
        except RecipeError as error:
            refused.add(error.key)
    assert loaded > 20
    assert len(refused) > 50
