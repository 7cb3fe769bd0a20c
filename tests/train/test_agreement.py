"""Ranks that were given different things never train together: every rank says in the same line what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from st_fast.core.errors import UserError
from st_fast.core.joining import Attempt
from st_fast.core.ranks import Ranks
from st_fast.data.ahead import FilesIdentity
from st_fast.data.shards import open_data
from st_fast.recipe import load
from st_fast.recipe.keys import keys
from st_fast.recipe.schema import SECTIONS
from st_fast.train import agreement
from st_fast.train.agreement import ELSEWHERE, agree, of_data, of_recipe
from tests import tiny

CPU = torch.device("cpu")
Say = Callable[[], Mapping[str, str]]


def outcome(*says: Say) -> list[str]:
    """What the ranks that say this are told; "" for one that goes on."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    address = "127.0.0.1", store.port

    def ask(rank: int) -> str:
        own = TCPStore(*address, is_master=False, wait_for_workers=False)
        try:
            agree(
                Ranks(rank, len(says), CPU, attempt=Attempt("a", rank, len(says), address, own)),
                "recipe",
                says[rank],
                20,
            )
        except UserError as error:
            assert error.exit_code == 2
            return str(error)
        return ""

    with ThreadPoolExecutor(len(says)) as pool:
        return list(pool.map(ask, range(len(says))))


def facts(**values: str) -> Say:
    return lambda: values


def raises(text: str) -> Say:
    def say() -> Mapping[str, str]:
        raise UserError(text)

    return say


def test_the_same_is_agreed_upon_and_each_difference_is_named_with_its_rank_on_all():
    same = facts(lr="0.1", seed="3")
    assert outcome(same, same, same) == [""] * 3
    one = (
        "the ranks were started with another recipe: rank 1 has lr = 0.2, rank 0 0.1; rank 2 has seed = none, rank 0 3"
    )
    told = outcome(same, facts(lr="0.2", seed="3"), facts(lr="0.1"))
    assert len(set(told)) == 1 and told[0].startswith(one) and "\n" not in told[0]


def test_what_is_wrong_on_one_rank_alone_ends_all_of_them_with_its_words():
    assert outcome(facts(), raises("data.path: gone")) == ["rank 1: data.path: gone"] * 2
    assert outcome(*[raises("data.path: gone")] * 2) == ["data.path: gone"] * 2


def test_files_of_another_age_are_the_same_if_any_rank_knows_their_content_to_be():
    def files(stat: str, content: str) -> Say:
        return lambda: {agreement.FILES: stat, agreement.CONTENT: content}

    here, copy = files("a", "x"), files("b", "x")
    assert outcome(here, files("a", ""), copy, files("b", "")) == [""] * 4
    assert "rank 1 has data files = y, rank 0 x" in outcome(here, files("b", "y"))[0]
    assert "rank 1 has data files = b, rank 0 x" in outcome(here, files("b", ""))[0]


def test_every_key_of_a_recipe_counts_but_where_the_data_lie(tmp_path):
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", tmp_path / "data", tmp_path / "out"))
    told = of_recipe(recipe)
    named = {f"{section}.{key}" for section, kind in SECTIONS.items() for key in keys(kind)}
    assert named - told.keys() == set(ELSEWHERE) == {"data.path", "validate.path"}
    for option in (
        "--run.out=x",
        "--optim.lr=1",
        "--stage.align.steps=3",
        "--stage.transcend.cfg_scale=2",
        "--run.seed=4",
    ):
        assert of_recipe(load(tmp_path / "tiny.toml", [option])) != told
    assert of_recipe(replace(recipe, data=replace(recipe.data, path="/elsewhere"))) == told


def test_another_version_counts(tmp_path, monkeypatch):
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", tmp_path / "data", tmp_path / "out"))
    here = of_recipe(recipe)
    monkeypatch.setattr(agreement, "__version__", "0.0.1")
    there = of_recipe(recipe)
    told = outcome(lambda: here, lambda: there)
    assert told[0] == told[1] and f"rank 1 has st_fast = 0.0.1, rank 0 {here['st_fast']}" in told[0]


def test_other_data_count_wherever_they_lie(tmp_path, monkeypatch):
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", tmp_path / "data", tmp_path / "out"))
    one, copy, other = (tiny.write_data(tmp_path / name, count) for name, count in (("a", 30), ("b", 30), ("c", 31)))
    digests = [of_data(recipe, open_data(folder)) for folder in (one, copy, other)]
    assert digests[0] == digests[1] != digests[2]
    records = open_data(one)
    monkeypatch.setattr(type(records), "files", FilesIdentity("times", "content"))
    assert of_data(recipe, records) == {**digests[0], agreement.FILES: "times", agreement.CONTENT: "content"}
