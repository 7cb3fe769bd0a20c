"""Whatever torchrun's variables say, a rank starts, refuses them in one line, or says in time who is missing."""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from st_fast.core import joining, machine
from st_fast.core.errors import EXIT_USAGE, RunFailed, UserError
from st_fast.core.ranks import process_group
from st_fast.recipe import load
from tests import tiny
from tests.core.test_joining import NO_NUMBERS
from tests.fuzz import SECONDS, blocks, watched

AT_ONCE = 100
COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
OTHERS = (
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
    "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "TORCHELASTIC_ERROR_FILE",
)  # fmt: skip
NUMBERS = ("0", "1", "2", "3", "4", "007", "64", "1048576", "1048577", "29500", "65535", "65536", "999999999")
TEXTS = (*NO_NUMBERS, "-0", "٣", "²", "0b1", "1\n", "\t1", "1\r", "inf", "nan", "None", "true", "True", "é" * 300,
         "x" * 100_000, "%s%n", "$(id)", "{0}", "/dev/null", "'\"", "\u202e1", "\udc80\udcff")  # fmt: skip
HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]", "0.0.0.0", "256.1.1.1", "a..b", "." * 200, "x" * 64 + ".y",
         "http://localhost", "localhost:29500", "127.0.0.1/8", "-", "*", "0x7f000001", "127.1", "xn--", "é",
         "fe80::1%nothing", "_", "127.0.0.1 ", "2130706433", "no such")  # fmt: skip


def drawn(draw: random.Random, port: int) -> dict[str, str]:
    """An environment: a sound one of one or a few ranks, with up to four variables of another value or missing."""
    count = draw.randint(1, 4)
    rank = str(draw.randrange(count))
    found = dict(zip(COUNTS, (str(count), rank, rank, str(count), str(port)), strict=True))
    found |= {"MASTER_ADDR": "127.0.0.1"} | {name: "1" for name in OTHERS}
    for name in draw.sample(sorted(found), draw.choice((0, 1, 1, 2, 4))):
        if draw.random() < 0.2:
            del found[name]
        elif name == "MASTER_ADDR" and draw.random() < 0.8:
            found[name] = draw.choice(HOSTS)
        else:
            found[name] = draw.choice(NUMBERS if draw.random() < 0.3 else TEXTS)
    return found


def place(values: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    for name in (*COUNTS, *OTHERS, "MASTER_ADDR"):
        patch.delenv(name, raising=False)
    for name, value in values.items():
        patch.setenv(name, value)


def no_network(host: str | None, *rest: Any, **named: Any) -> Any:
    """Addresses of this machine; another name is encoded as ever, and then unknown."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return REAL(host, *rest, **named)
    (host or "").encode("idna")
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


REAL = socket.getaddrinfo


@pytest.mark.parametrize("block", blocks(1, 20))
def test_torchruns_variables_of_any_text(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tmp_path / "data", tmp_path / "out")
    monkeypatch.setattr(joining, "UNKNOWN_HOST", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        nobody = held.getsockname()[1]
        for number in range(AT_ONCE):
            draw = random.Random(seed := 10_000 * block + number)
            values, started = drawn(draw, nobody), False
            place(values, monkeypatch)
            start = time.monotonic()
            try:
                with watched("torchrun's environment", sum(map(len, values.values()))):
                    try:
                        assert machine.local_count() >= 1 and machine.usable_threads() >= 1
                        load(recipe, ranks=machine.rank_count())
                        with process_group("cpu", 1.0, joining=0.05) as ranks:
                            started = True
                            assert (ranks.rank, ranks.count) == (0, 1) == (machine.rank(), machine.rank_count())
                    except RunFailed as error:  # the others did not come
                        assert str(error).startswith("joining: ") and int(values["WORLD_SIZE"]) > 1
                        raise
                    except UserError as error:
                        assert error.exit_code == EXIT_USAGE and str(error).isprintable() and len(str(error)) < 500
                        raise
            except Exception as error:
                error.add_note(f"seed {seed}: {values!a}"[:1_000])
                raise
            assert time.monotonic() - start < SECONDS
            # One process needs none of them, and nothing but its own count and number may keep it from starting.
            assert started or values.get("WORLD_SIZE", "1") != "1" or "RANK" in values


@pytest.mark.parametrize("changed", [
    {"WORLD_SIZE": "٣"}, {"RANK": "\udcff" * 100_000},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a..b", "MASTER_PORT": "29500"},
])  # fmt: skip
def test_a_process_of_its_own_ends_with_one_line_in_seconds(changed: dict[str, str], tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    done = tiny.train(recipe, **changed)
    told = [line for line in done.stderr.splitlines() if line.startswith("st_fast: ")]
    assert done.returncode == EXIT_USAGE and len(told) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
