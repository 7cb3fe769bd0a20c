"""Ranks find one another at every start anew, whatever an earlier start left in the store, and in a bounded time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from st_fast.core import joining, machine
from st_fast.core.errors import EXIT_USAGE, RunFailed, UserError
from st_fast.core.joining import Attempt, join

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SOUND = dict(zip(NAMES, ("4", "3", "1", "2", "127.0.0.1", "29500"), strict=True))
NO_NUMBERS = (
    "",
    " ",
    "two",
    "-1",
    "1.0",
    "1e3",
    "0x1",
    "\u0661",
    "4 ranks",
    "1_0",
    "9" * 5_000,
    "\x1b[31m",
    "\udcff",
    "+1",
)


@pytest.fixture
def environment(monkeypatch) -> Callable[..., None]:
    """Sets torchrun's variables; None removes one."""

    def place(**changed: str | None) -> None:
        for name in (*NAMES, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (SOUND | changed).items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return place


def everything() -> tuple[object, ...]:
    return machine.rank_count(), machine.rank(), machine.local_rank(), machine.meeting_point()


def test_torchruns_variables_are_read_and_a_process_alone_needs_none(environment, monkeypatch):
    environment()
    assert everything() == (4, 3, 1, ("127.0.0.1", 29500))
    for name in NAMES:
        monkeypatch.delenv(name)
    assert (machine.rank_count(), machine.rank(), machine.local_rank()) == (1, 0, 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "MASTER_ADDR"])
def test_a_variable_that_is_no_number_is_one_line_with_its_name_and_value(name, environment):
    for value in NO_NUMBERS:
        environment(**{name: value})
        with pytest.raises(UserError) as caught:
            everything()
        text = str(caught.value)
        assert text.startswith(f"environment: {name} = ") and text.isprintable() and len(text) < 300, text
        assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "99999999"}, "WORLD_SIZE"),
        ({"RANK": "4"}, "RANK"),
        ({"RANK": None}, "RANK is not set beside WORLD_SIZE = 4"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE"),
        ({"WORLD_SIZE": None}, "RANK = '3'; allowed: a whole number from 0 to 0"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "a\nb"}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "x" * 4_000}, "MASTER_ADDR"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT"),
    ],
)
def test_what_is_missing_or_contradicts_the_rest_is_named(changed, named, environment):
    environment(**changed)
    with pytest.raises(UserError, match=named):
        everything()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "." * 200])
def test_a_host_that_nobody_knows_is_told_within_seconds(host, environment, monkeypatch):
    monkeypatch.setattr(joining, "UNKNOWN_HOST", 0.1)
    environment(MASTER_ADDR=host)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        join(3, 4, 30)


@pytest.fixture
def store(environment) -> Iterator[TCPStore]:
    """torchrun's store, which stays for all attempts of a job."""
    found = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    environment(MASTER_PORT=str(found.port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="job ü")
    yield found


def together(count: int, patience: float = 20.0) -> list[Attempt]:
    """All ranks join, the last ones first."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: join(rank, count, patience), reversed(range(count))))[::-1]


def test_a_restart_in_the_same_store_meets_under_another_name_though_a_rank_comes_before_the_first(store):
    first, again = together(3), together(3)
    assert len({one.name for one in first}) == len({one.name for one in again}) == 1
    assert first[0].name != again[0].name
    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(lambda one: one.exchange("topic", f"from {one.rank}", 20.0), again))
    assert told == [["from 0", "from 1", "from 2"]] * 3


def test_who_did_not_come_is_named_by_those_who_did(store):
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(join, rank, 3, 0.5) for rank in (0, 1)]
        errors = [future.exception() for future in waiting]
    assert all(isinstance(error, RunFailed) for error in errors)
    assert str(errors[0]) == "joining: rank 2 of 3 did not come within 0.5 s"
    with pytest.raises(RunFailed, match="rank 0 of 2 did not come"):
        joined_before = together(2)
        assert len(joined_before) == 2
        join(1, 2, 0.3)  # the attempt that the store knows was answered long ago


def test_a_rank_that_keeps_silent_is_named(store):
    first, *_ = together(3)
    with pytest.raises(RunFailed, match=r"ranks 1, 2 of 3 did not answer within 0.2 s \(recipe\)"):
        first.exchange("recipe", "", 0.2)


def test_without_torchrun_the_first_rank_keeps_the_store(environment):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_PORT=str(port))
    assert len({one.name for one in together(2)}) == 1


def test_nobody_at_the_port_is_told_after_the_bound(environment):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        environment(MASTER_PORT=str(held.getsockname()[1]))
        with pytest.raises(RunFailed, match="has not opened"):
            join(3, 4, 0.3)
    assert os.environ["WORLD_SIZE"] == "4"
