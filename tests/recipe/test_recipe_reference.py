"""Every key is explained where it is declared, and the page and the command's help say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from st_fast.recipe.keys import keys
from st_fast.recipe.methods import METHODS
from st_fast.recipe.schema import SECTIONS, Contrast, Start
from st_fast.train.__main__ import parser

ROOT = Path(__file__).parents[2]
DECLARED = {**SECTIONS, **METHODS, "start": Start, "contrast": Contrast}


@pytest.mark.parametrize("name", DECLARED)
def test_every_key_has_a_sentence_and_a_default_of_its_own_type(name: str) -> None:
    for key, said in keys(DECLARED[name]).items():
        assert said.help[:1].isupper() or not said.help[:1].isascii() or said.help[:1] == '"', key
        assert said.help.endswith(".") and "\n" not in said.help, key


def test_the_committed_page_is_what_the_schema_says_and_needs_no_torch() -> None:
    code = "import sys; from st_fast.recipe.reference import page; print(page(), end='')"
    code += "; assert not {'torch', 'numpy'} & set(sys.modules)"
    written = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout
    remedy = "python -m st_fast.recipe.reference > docs/recipe.md"
    assert (ROOT / "docs" / "recipe.md").read_bytes() == written, remedy


def test_the_commands_help_has_every_key_of_a_section_with_its_sentence() -> None:
    text = " ".join(parser().format_help().split())
    for section, cls in SECTIONS.items():
        for key, said in keys(cls).items():
            assert f"--{section}.{key} VALUE {said.help}" in text
