"""One version everywhere: the package's, the changelog's, the citation's and that of a tag on this commit."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

import st_fast

ROOT = Path(__file__).resolve().parents[2]
RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", re.M)


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no clone")
def test_a_tag_on_this_commit_is_the_version_of_the_package() -> None:
    command = ["git", "tag", "--points-at", "HEAD", "--list", "v*"]
    tags = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert tags in ([], [f"v{st_fast.__version__}"])


def test_the_changelog_ends_at_this_version_and_goes_back_in_time() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = [(tuple(map(int, name.split("."))), date.fromisoformat(day)) for name, day in RELEASE.findall(text)]
    assert ".".join(map(str, releases[0][0])) == st_fast.__version__
    assert releases == sorted(releases, reverse=True)
    headings = re.findall(r"^## .*$", text, re.M)
    assert headings[0] == "## [Unreleased]" and len(headings) == 1 + len(releases)


def test_the_citation_names_this_version_its_day_and_the_papers_number() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    days = dict(RELEASE.findall((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    assert citation["version"] == st_fast.__version__
    assert citation["date-released"] == days[st_fast.__version__]
    assert citation["authors"] == [{"name": "st_fast contributors"}]
    assert "arXiv:2601.07773" in str(citation["references"])


def test_every_python_that_is_claimed_may_install_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = re.fullmatch(r">=3\.(\d+)", project["requires-python"])
    claimed = re.findall(r"Python :: 3\.(\d+)", " ".join(project["classifiers"]))
    assert oldest and claimed and min(map(int, claimed)) == int(oldest[1])
