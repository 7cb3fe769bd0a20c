"""The command `python -m tests.mutants`; see the package's text."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from tests.mutants.changes import mutants
from tests.mutants.files import FILES, File
from tests.mutants.trial import ROOT, tried

EQUIVALENT = Path(__file__).with_name("equivalent.toml")
KINDS = ("killed", "timed out", "crashed", "survived")


def equivalents(path: str) -> dict[str, str]:
    """The listed changes of a file that make no difference: key → reason."""
    listed = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return {f"{one['line']} | {one['change']}": one["why"] for one in listed["equivalent"] if one["file"] == path}


def digest(*paths: str) -> str:
    """SHA-256 over files, of folders over all Python files in them."""
    files = [
        f for path in paths for f in (sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path])
    ]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.exists())).hexdigest()[:16]


def main() -> int:
    """Tries what has not been tried yet, writes each result as it comes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of the core; none: all")
    parser.add_argument("--sample", type=int, metavar="N", help="only N mutants of each file, drawn at random")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.json")
    parser.add_argument("--table", action="store_true", help="try nothing, print what --out holds")
    given = parser.parse_args()
    known = {file.path: file for file in FILES}
    if unknown := [path for path in given.files if path not in known]:
        parser.error(f"{unknown[0]} is not one of {', '.join(known)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    chosen = [known[path] for path in given.files] or list(FILES)
    for file in chosen if not given.table else ():
        attempt(file, results, given.out, given.sample)
    return table(chosen, results)


def attempt(file: File, results: dict[str, Any], out: Path, sample: int | None) -> None:
    """Tries the mutants of a file that were not, and survivors again if a test has changed."""
    source = (ROOT / file.path).read_text(encoding="utf-8")
    tests = [f"tests/{name}" for name in dict.fromkeys(file.tests) if (ROOT / "tests" / name).exists()]
    tree, found = mutants(source, file.names)
    state = results.setdefault(file.path, {})
    now = {"source": digest(file.path), "tests": digest(*tests)}
    if state.get("source") != now["source"]:
        state |= {"seconds": 0.0, "verdicts": {}}
    verdicts: dict[str, str] = state["verdicts"]
    if state.get("tests") != now["tests"]:
        for key in [key for key, said in verdicts.items() if said.startswith("survived")]:
            del verdicts[key]
    state |= now
    keys = {mutant.key for mutant in found}
    for key in set(verdicts) - keys:
        del verdicts[key]
    todo = [mutant for mutant in found if mutant.key not in verdicts]
    if sample is not None:
        todo = sorted(random.Random(0).sample(todo, min(sample, len(todo))), key=found.index)
    if not todo:
        return
    start = time.monotonic()
    for mutant, said in tried(file.path, tests, source, tree, todo):
        verdicts[mutant.key] = said
        seconds, start = time.monotonic() - start, time.monotonic()
        state["seconds"] = round(state["seconds"] + seconds, 1)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
        if not said.startswith("killed"):
            print(f"{file.path}:{mutant.first}: {said}: {mutant.key}", flush=True)


def table(files: list[File], results: dict[str, Any]) -> int:
    """Prints counts by file, what is listed in vain, and the survivors; 1 if a survivor is not listed."""
    rows, left = [], 0
    for file in files:
        verdicts: dict[str, str] = results.get(file.path, {}).get("verdicts", {})
        listed = equivalents(file.path)
        survivors = [key for key, said in verdicts.items() if said.startswith("survived")]
        for key in listed:
            if key not in survivors:
                print(f"{file.path}: listed as equivalent, but {verdicts.get(key, 'not there')}: {key}")
        open_ones = [key for key in survivors if key not in listed]
        for key in open_ones:
            print(f"{file.path}: SURVIVED: {key}")
        counts = Counter(next(kind for kind in KINDS if said.startswith(kind)) for said in verdicts.values())
        rows.append(
            (
                file.path,
                len(verdicts),
                *(counts[kind] for kind in KINDS[:3]),
                len(survivors) - len(open_ones),
                len(open_ones),
                results.get(file.path, {}).get("seconds", 0.0),
            )
        )
        left += len(open_ones)
    total = ("all", *(sum(row[i] for row in rows) for i in range(1, 8)))
    print("| file | mutants | killed | timed out | crashed | equivalent | survived | score | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path, count, killed, late, crashed, same, survived, seconds in (*rows, total):
        score = 100 * (1 - survived / max(count - same, 1))
        counts = " | ".join(map(str, (count, killed, late, crashed, same, survived)))
        print(f"| {path} | {counts} | {score:.1f} % | {seconds:.0f} |")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
