"""The page of all keys of a recipe: `python -m st_fast.recipe.reference > docs/recipe.md`. Imports no torch."""

from collections.abc import Iterable
from dataclasses import MISSING

from st_fast.recipe.keys import Key, describe, keys
from st_fast.recipe.load import to_literal
from st_fast.recipe.methods import METHODS
from st_fast.recipe.routing import Routing
from st_fast.recipe.schema import SECTIONS, Contrast, Stage, Start

HEAD = """\
# The keys of a recipe

A recipe is a TOML file with the sections below and one `[[stage]]` or more. On the command line a key is
`--section.key=value` or `--stage.NAME.key=value`. A wrong key or value is reported in one line, before anything starts.

**Resume** says whether the same run may go on after the key has changed: "yes" for keys that only observe the run or do
the same work in another way, "no" for keys that change the numbers of training, which need `--accept-changes`.

<!-- Written by `python -m st_fast.recipe.reference > docs/recipe.md` from the fields of st_fast/recipe. -->
"""
SUPERVISION = Key(str, MISSING, "The method that supervises the stage; its keys are below.", free=False)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += [_part(f"[{name}]", cls.__doc__, keys(cls).items()) for name, cls in SECTIONS.items()]
    own = keys(Stage)
    stage = [("name", own["name"]), ("supervision", SUPERVISION), ("steps", own["steps"])]
    stage += [*keys(Start).items(), *keys(Contrast).items(), *keys(Routing).items()]
    parts.append(_part("[[stage]]", "A stage; stages run in order.", stage))
    parts += [_part(f'supervision = "{name}"', cls.__doc__, keys(cls).items()) for name, cls in METHODS.items()]
    return "\n".join(parts)


def _part(title: str, text: str | None, entries: Iterable[tuple[str, Key]]) -> str:
    rows = ["| key | value | default | resume | |", "|---|---|---|---|---|"]
    for name, key in entries:
        default = "must be given" if key.default is MISSING else f"`{to_literal(key.default)}`"
        cells = (f"`{name}`", describe(key.kind), default, "yes" if key.free else "no", key.help)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    first = (text or "").split("\n\n")[0]
    return "\n".join([f"## `{title}`", "", first, "", *(rows if len(rows) > 2 else ["No keys."]), ""])


if __name__ == "__main__":
    print(page(), end="")
