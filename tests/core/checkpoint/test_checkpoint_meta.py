"""What a checkpoint says of its training is checked like its tensors: what is malformed is damage."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from st_fast.core.checkpoint import latest, load, save, valid
from st_fast.core.checkpoint.meta import (
    FilesIdentity,
    GraphChoice,
    Guard,
    Init,
    Meta,
    MicroBatch,
    SkippedSteps,
    SpikeHistory,
    Teacher,
)
from st_fast.core.errors import RunFailed

STEP = 30
SOUND = Meta(
    stage="align", recipe="[run]\nseed = 3\n", architecture={"heads": 2, "qk_norm": False}, dataset="ab" * 32,
    files=FilesIdentity("cd" * 32, ""), features=("ef" * 32, "live:01"), teacher=Teacher("t", 7, "raw", "23" * 32),
    seconds=12.5, rollbacks=2, guard=Guard(SkippedSteps(5, 3), SpikeHistory((0.5, 2.0), 1, 29), STEP),
    stopped_at=20, init=Init("x.pt", "repa", 400_000, "45" * 32, "ema", "fresh", ("final_layer",)),
    micro_batch=MicroBatch(4, 2, True), kernels={"gelu_mlp": "fused"}, cuda_graphs=GraphChoice(True, 2),
    versions={"torch": "2.13"},
)  # fmt: skip
NO_COUNTS = ("3", [], {}, None, -1, 2.5, True, 2**63)
MALFORMED: list[tuple[str, tuple[Any, ...]]] = [
    ("stage", (3, None, [], {})),
    ("recipe", (3, None, ["[run]"], {"run": {}})),
    ("architecture", ("SiT-B/2", 3, [2, 3])),
    ("architecture.depth", (*NO_COUNTS, 0, 10_001)),
    ("architecture.latent_size", (*NO_COUNTS, 0, 2**40)),
    ("architecture.mlp_ratio", ("4", None, [], 0, -4.0, 1000.5, True)),
    ("architecture.qk_norm", (1, None, "true")),
    ("dataset", (3, None, ["ab"])),
    ("files", ("cd", [], {"content": "cd"}, {"stat": None}, {"stat": "cd", "content": None})),
    ("features", ("ef", None, {"0": "ef"}, [None], ["ef", 3], [["ef"]])),
    ("teacher", ("align", [], {}, {"step": 7}, {"path": "t", "step": 7, "weights": "raw", "sha256": None})),
    ("teacher.step", NO_COUNTS),
    ("seconds", ("12", None, [], {}, -0.5, 1e300, True)),
    ("rollbacks", (*NO_COUNTS, STEP + 1)),
    ("guard", ("text", None, [], {}, {"skips": {}})),
    ("guard.skips", (None, [], 3, {})),
    ("guard.skips.total", (*NO_COUNTS, 2, STEP + 1)),
    ("guard.skips.in_row", (*NO_COUNTS, 6)),
    ("guard.spikes", (None, [], {})),
    ("guard.spikes.usual", (None, 1.0, "1", {}, [None], ["1"], [[1.0]], [-1.0], [1.0] * 31)),
    ("guard.spikes.high", (*NO_COUNTS, STEP + 1)),
    ("guard.spikes.found", ("29", [], -1, 0, 2.5, True, STEP + 1)),
    ("guard.rolled_back_at", (*NO_COUNTS, STEP + 1)),
    ("stopped_at", (*NO_COUNTS, STEP + 1)),
    ("init", ("x.pt", [], {}, {"path": "x.pt"})),
    ("init.step", NO_COUNTS),
    ("init.fresh", ("x", None, [3])),
    ("micro_batch", (4, [], {}, {"images": 4})),
    ("micro_batch.images", (*NO_COUNTS, 0)),
    ("micro_batch.ranks", (*NO_COUNTS, 0, 2**40)),
    ("micro_batch.halved", (1, None, "false")),
    ("kernels", ("fused", [], {"gelu_mlp": None}, {"gelu_mlp": "magic"}, {"gelu_mlp": ["fused"]})),
    ("cuda_graphs", (True, [], {}, {"used": True})),
    ("cuda_graphs.used", (1, None, "true")),
    ("cuda_graphs.ranks", (*NO_COUNTS, 0)),
]


def with_value(key: str, value: Any) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(json.dumps(asdict(SOUND)))
    *above, name = key.split(".")
    table = meta
    for part in above:
        table = table[part]
    table[name] = value
    return meta


@pytest.mark.parametrize(("key", "values"), MALFORMED, ids=[key for key, _ in MALFORMED])
def test_a_malformed_value_is_damage_and_the_checkpoint_before_is_taken(
    key: str, values: tuple[Any, ...], tmp_path: Path, state: Any, forge: Any
) -> None:
    older = save(tmp_path, STEP - 10, state(0), {})
    path = save(tmp_path, STEP, state(0), asdict(SOUND))
    for value in values:
        forge(path, lambda manifest, value=value: manifest.update(meta=with_value(key, value)))
        lines: list[str] = []
        found = latest(tmp_path, lines.append)
        assert found is not None and found.step == STEP - 10, f"{key} = {value!r}"
        (line,) = lines
        assert line.startswith(f"checkpoint {STEP:08d} is broken, kept as it is") and len(line) < 500
        assert f"meta: {key.split('.')[0]}" in line and "\n" not in line
        assert valid(path) is not None
    shutil.rmtree(older)
    with pytest.raises(RunFailed, match=r"none of its 1 checkpoints can be read: .*manifest\.json: meta: "):
        latest(tmp_path, lines.append)


def test_what_is_written_is_what_is_read(tmp_path: Path, state: Any) -> None:
    found = load(save(tmp_path, STEP, state(0), asdict(SOUND)))
    assert found.said == SOUND and found.meta == json.loads(json.dumps(asdict(SOUND)))


@pytest.mark.parametrize("key", list(asdict(SOUND)))
def test_a_key_that_an_older_version_did_not_write_has_its_default(key: str, tmp_path: Path, state: Any) -> None:
    meta = {name: value for name, value in asdict(SOUND).items() if name != key}
    if key == "seconds":  # every version that trained wrote both
        path = save(tmp_path, STEP, state(0), meta)
        assert "meta: the field seconds is missing" in str(valid(path))
        del meta["rollbacks"]
        key = "rollbacks"
    found = load(save(tmp_path, STEP, state(0), meta)).said
    assert getattr(found, key) == getattr(Meta(), key) and found.versions == meta.get("versions")


def test_keys_of_a_newer_version_or_another_program_are_passed_over(tmp_path: Path, state: Any) -> None:
    meta = json.loads(json.dumps(asdict(SOUND))) | {"source": {"file": 3}, "new": [None]}
    meta["guard"]["new"] = meta["micro_batch"]["new"] = [1]
    assert load(save(tmp_path, STEP, state(0), meta)).said == SOUND
