"""Tries mutants of one file: a fork for each, from a process that has imported the tests and collected them.

In the fork the changed functions get their new code, and the tests run that ran the changed lines before, cheapest
first, until one fails. A change outside of any function takes a fork from before the project was imported.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import scipy.stats  # noqa: F401  what most tests import is there before any fork
import torch  # noqa: F401
from _pytest.runner import runtestprotocol

from tests.mutants.changes import Mutant, changed

ROOT = Path(__file__).resolve().parent.parent.parent
ARGUMENTS = ("-q", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:timeout", "-p", "no:randomly")
LONGEST, ENOUGH = 30.0, 120.0
"""Seconds: slower tests are left out; the tests of a mutant take no more than this together when nothing is wrong."""
PATIENCE = 30.0
KILLED = "killed by "
MEMORY = 16 * 2**30


@dataclass
class Ran:
    """The processor time that a test took, and which lines of the file it ran."""

    seconds: float
    lines: list[int]


@dataclass
class Baseline:
    """The unchanged file's tests."""

    tests: dict[str, Ran] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)

    def chosen(self, mutant: Mutant, killers: Sequence[str] = ()) -> list[str]:
        """The tests that run the changed statement (outside of a function all), those that killed before first.

        After them files of quick tests come first.
        """
        near = range(mutant.first, mutant.last + 1)
        seen = [n for n, ran in self.tests.items() if not mutant.inside or any(line in near for line in ran.lines)]
        groups: dict[str, list[str]] = {}
        for name in sorted(seen, key=lambda name: self.tests[name].seconds):
            groups.setdefault(name.partition("::")[0], []).append(name)
        quick = sorted(groups.values(), key=lambda group: sum(self.tests[n].seconds for n in group) / len(group))
        chosen, total = list[str](), 0.0
        for name in (name for group in quick for name in group):
            total += self.tests[name].seconds
            if total <= ENOUGH:
                chosen.append(name)
        return sorted(chosen, key=lambda name: name not in killers)


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Forks; the child does the work with the writing end of a pipe. Its id and the reading end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.setsid()
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        work(writing)
        code = 0
    finally:
        os._exit(code)


def told(writing: int, **message: Any) -> None:
    os.write(writing, json.dumps(message).encode() + b"\n")


def messages(pid: int, reading: int, patience: float = PATIENCE) -> Iterator[dict[str, Any]]:
    """What a child tells, until it ends: the last one has "ended" or, if it was silent too long, "silent".

    A message may say for how many seconds nothing may follow.
    """
    rest, silent = b"", False
    while True:
        if not select.select([reading], [], [], patience)[0]:
            silent = True
            break
        part = os.read(reading, 2**20)
        if not part:
            break
        *lines, rest = (rest + part).split(b"\n")
        for message in map(json.loads, lines):
            patience = message.get("patience", patience)
            yield message
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    yield {"silent": True} if silent else {"ended": status}


class Loop:
    """A pytest plugin: what is done with the collected tests instead of running them."""

    def __init__(self, work: Callable[[list[pytest.Item]], None]) -> None:
        self.work = work

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.work(session.items)
        return True


def collected(tests: Sequence[str], work: Callable[[list[pytest.Item]], None]) -> None:
    pytest.main([*ARGUMENTS, *tests], plugins=[Loop(work)])


def measured(items: list[pytest.Item], file: Path, writing: int) -> None:
    """Runs every test of the unchanged file; tells those that pass with their seconds and the file's lines they ran."""
    lines: set[int] = set()

    def local(frame: Any, event: str, _: object) -> Any:
        lines.add(frame.f_lineno)
        return local

    known: dict[str, bool] = {}

    def trace(frame: Any, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if name not in known:
            known[name] = os.path.realpath(name) == str(file)
        return local(frame, event, _) if known[name] else None

    before = set(sys.modules)
    for item, following in zip(items, [*items[1:], None], strict=True):
        lines.clear()
        start = time.process_time()
        told(writing, patience=600.0)
        threading.settrace(trace)
        sys.settrace(trace)
        reports = runtestprotocol(item, nextitem=following, log=False)
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        seconds = time.process_time() - start
        if [r.outcome for r in reports] == ["passed"] * 3 and seconds <= LONGEST and (lines or seconds < 0.1):
            told(writing, name=item.nodeid, seconds=round(seconds, 3), lines=sorted(lines))
    told(writing, modules=sorted(set(sys.modules) - before))


def baseline(items: list[pytest.Item], file: Path) -> Baseline:
    """Of tests that pass and run the file; measured in a fork."""
    found = Baseline()
    for message in messages(*in_child(lambda writing: measured(items, file, writing))):
        if "name" in message:
            found.tests[message["name"]] = Ran(message["seconds"], message["lines"])
        found.modules = message.get("modules", found.modules)
    return found


def run(items: list[pytest.Item], names: list[str], ran: dict[str, Ran], writing: int) -> None:
    """Runs these tests until one fails, whose name is told."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    by_name = {item.nodeid: item for item in items}
    chosen = [by_name[name] for name in names if name in by_name]
    for i, item in enumerate(chosen):
        told(writing, patience=PATIENCE + 10 * ran[item.nodeid].seconds)
        try:
            reports = runtestprotocol(item, nextitem=chosen[i + 1] if item is not chosen[-1] else None, log=False)
            failed = any(report.failed for report in reports)
        except BaseException:  # one that pytest passes on, as an interruption
            failed = True
        if failed:
            told(writing, killed=item.nodeid)
            return
    told(writing, survived=len(chosen))


def codes(code: CodeType) -> list[CodeType]:
    """The code itself and all that is in it, in order."""
    return [code, *(inner for one in code.co_consts if isinstance(one, CodeType) for inner in codes(one))]


class Functions:
    """The file's functions in this process, to be given other code."""

    def __init__(self, file: Path, source: str) -> None:
        self.file = file
        gc.unfreeze()  # tests/conftest.py freezes what is there when the tests are collected
        living = [f for f in gc.get_objects() if isinstance(f, FunctionType)]
        self.living = [f for f in living if os.path.realpath(f.__code__.co_filename) == str(file)]
        self.original = codes(compile(source, str(file), "exec", dont_inherit=True))
        self.places: list[int | None] = [self._place(f.__code__) for f in self.living]

    def _place(self, code: CodeType) -> int | None:
        same = [i for i, one in enumerate(self.original) if one.replace(co_filename=code.co_filename) == code]
        return same[0] if same else None

    def replaceable(self, new: CodeType) -> list[CodeType] | None:
        """All codes of the changed file, if each fits in its function's place."""
        found = codes(new)
        if len(found) != len(self.original):
            return None
        fits = all(
            a.co_name == b.co_name and a.co_freevars == b.co_freevars for a, b in zip(found, self.original, strict=True)
        )
        return found if fits else None

    def replace(self, new: list[CodeType]) -> None:
        for function, place in zip(self.living, self.places, strict=True):
            if place is not None and new[place] != self.original[place]:
                function.__code__ = new[place]


class Finder(importlib.abc.MetaPathFinder):
    """Gives one module other code when it is imported."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader.get_code = lambda fullname: self.code  # type: ignore[method-assign]
        return spec


def module_name(path: str) -> str:
    """st_fast/model/flow.py → st_fast.model.flow; kernels/ is imported as st_fast.kernels."""
    parts = Path(path).with_suffix("").parts
    parts = ("st_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def verdict(pid: int, reading: int) -> str:
    """What became of a mutant: "killed by …", "survived …", "timed out" or "crashed"."""
    said = "crashed"
    for message in messages(pid, reading, 120.0):
        if "killed" in message:
            said = KILLED + message["killed"]
        elif "survived" in message:
            said = f"survived {message['survived']} tests"
        elif "silent" in message:
            said = "timed out"
        elif message.get("ended") == 0 and said == "crashed":
            said = "killed by its import"
        elif os.WIFEXITED(message.get("ended", 0)) and message.get("ended"):
            raise RuntimeError(f"trying a mutant failed with code {os.waitstatus_to_exitcode(message['ended'])}")
    return said


def tried(
    path: str, tests: Sequence[str], source: str, tree: ast.Module, mutants: list[Mutant]
) -> Iterator[tuple[Mutant, str]]:
    """Every mutant with what became of it. Call it in a process that has not imported the project."""
    file = (ROOT / path).resolve()

    def session(writing: int) -> None:
        def work(items: list[pytest.Item]) -> None:
            found = baseline(items, file)
            for name in found.modules:
                try:
                    importlib.import_module(name)
                except Exception:
                    continue
            functions = Functions(file, source)
            told(writing, tests={name: [ran.seconds, ran.lines] for name, ran in found.tests.items()})
            gc.collect()
            gc.freeze()
            killers: deque[str] = deque(maxlen=3)
            for number, mutant in enumerate(mutants):
                new = changed(
                    tree, mutant, lambda t: functions.replaceable(compile(t, str(file), "exec", dont_inherit=True))
                )
                if not mutant.inside or new is None:
                    continue
                names = found.chosen(mutant, killers)

                def child(pipe: int, new: list[CodeType] = new, names: list[str] = names) -> None:
                    functions.replace(new)
                    run(items, names, found.tests, pipe)

                said = verdict(*in_child(child))
                told(writing, number=number, verdict=said, patience=3600.0)
                if said.startswith(KILLED):
                    killers.append(said.removeprefix(KILLED))

        collected(tests, work)

    found, done = Baseline(), set[int]()
    for message in messages(*in_child(session), 3600.0):
        if "tests" in message:
            found.tests = {name: Ran(*values) for name, values in message["tests"].items()}
            print(f"{path}: {len(found.tests)} tests, {sum(r.seconds for r in found.tests.values()):.0f} s", flush=True)
        elif "verdict" in message:
            done.add(message["number"])
            yield mutants[message["number"]], message["verdict"]
    if not found.tests:
        raise RuntimeError(f"{path}: none of {', '.join(tests)} runs it")
    for number, mutant in enumerate(mutants):
        if number not in done:
            code = changed(tree, mutant, lambda t: compile(t, str(file), "exec", dont_inherit=True))
            names = found.chosen(mutant)

            def child(pipe: int, code: CodeType = code, names: list[str] = names) -> None:
                sys.meta_path.insert(0, Finder(module_name(path), code))
                files = list(dict.fromkeys(name.partition("::")[0] for name in names))
                collected(files, lambda items: run(items, names, found.tests, pipe))

            yield mutant, verdict(*in_child(child))
