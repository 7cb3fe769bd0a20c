"""What names a version names the same one, and the citation is sound."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
import yaml

from st_fast import __version__
from tests.tiny import ROOT


def test_changelog_and_citation_are_of_this_version() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert versions[0] == (__version__, citation["date-released"]) and citation["version"] == __version__
    assert versions == sorted(versions, key=lambda one: tuple(map(int, one[0].split("."))), reverse=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_a_tag_of_this_commit_is_its_version() -> None:
    asked = ["git", "tag", "--points-at", "HEAD", "v[0-9]*"]
    tags = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tags:
        pytest.skip("no release is tagged here")
    assert tags == [f"v{__version__}"]


def test_the_citation_has_what_its_schema_asks_for() -> None:
    """Citation File Format 1.2.0: these keys, authors with names, and references with a type, a title and authors."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert all(one.get("name") or one.get("family-names") for one in citation["authors"])
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys() and reference["url"].startswith("https://")


def test_classifiers_name_pythons_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", one) for one in project["classifiers"]]
    minors = [int(match[1]) for match in named if match]
    least = int(re.fullmatch(r">=3\.(\d+)", project["requires-python"])[1])
    assert minors and min(minors) == least
