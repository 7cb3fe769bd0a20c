"""Captions and their states: whole rows in the captions' order, and states of other captions or latents refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.data.shards import open_data
from st_fast.data.text import CAPTIONS, captions_bytes, open_text, read_captions, text_folder
from st_fast.model.text_encoders import TextEncoder, load_text_encoder
from st_fast.prepare import text as text_module
from st_fast.prepare import writing
from tests.tiny_text import CAPTIONS as LINES
from tests.tiny_text import ENCODER, IMAGES, LENGTH, WIDTH, make_data, states_of, write_states, write_text_encoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("flip", [False, True])
def test_a_share_of_a_record_picks_one_of_its_own_captions(flip: bool, tmp_path: Path) -> None:
    data = make_data(tmp_path / "set", flip)
    text = open_text(data, "", records := open_data(data))
    assert torch.equal(text.null(), states_of([""])[0]) and (text.manifest.length, text.manifest.width) == (4, 6)
    for share, wanted in ((0.0, 0), (0.34, 0.34), (0.5, 0.5), (1 - 2**-53, 1)):
        numbers = np.array([5, 0, len(records) - 1, 8, 5])
        rows = text.rows_of(numbers, np.full(5, share))
        lines = [LINES[number // (1 + flip)] for number in numbers]
        chosen = [line[min(int(wanted * len(line)), len(line) - 1)] for line in lines]
        assert torch.equal(text.states(rows), states_of(chosen))
    each = np.arange(len(records))
    assert set(text.rows_of(each, np.zeros(len(each)))) | {0} <= set(range(text.manifest.count))
    assert len(set(text.rows_of(each, np.zeros(len(each))))) == IMAGES


def test_states_of_other_captions_latents_or_encoders_are_refused_in_one_line(tmp_path: Path) -> None:
    data = make_data(tmp_path / "set")
    records, captions, manifest = open_data(data), data / CAPTIONS, data / "manifest.json"
    with pytest.raises(UserError, match=r"no complete text states of other; .* --text other"):
        open_text(data, "other", records)
    text_folder(data, "some/begun").mkdir()  # without a manifest it counts for nothing
    assert open_text(data, "", records).manifest.encoder == ENCODER
    states = text_folder(data, ENCODER) / "manifest.json"
    whole = states.read_text()
    states.write_text(json.dumps(json.loads(whole) | {"shape": [2, 2, WIDTH]}))
    with pytest.raises(BadFile, match=r"\(1, L, W\) is needed"):
        open_text(data, ENCODER, records)
    states.write_text(whole)
    write_states(data, "else/second")
    with pytest.raises(UserError, match=r"states of second, tiny-encoder: data.text must name one"):
        open_text(data, "", records)
    assert open_text(data, "none/tiny-encoder", records).manifest.encoder == ENCODER
    changed = {
        captions_bytes([*LINES[:-1], ["another"]]): "other captions",
        captions_bytes(LINES[:-1]): "other records",
        b'["a"]\n"b"\n': "line 2",
        b'["a"]\n[]\n': "line 2",
        b'["a"]\n["b", 3]\n': "line 2",
        b'["a"]\n\xff["b"]\n': "line 2",
        b'["a"]\n["b \\ud83d"]\n': "line 2",
        b"[" * 100_000: "line 1",
    }
    for content, words in changed.items():
        captions.write_bytes(content)
        with pytest.raises(BadFile, match=words) as refused:
            open_text(data, ENCODER, records)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    captions.write_bytes(captions_bytes(LINES))
    manifest.write_text(manifest.read_text().replace('"random"', '"others"'))
    with pytest.raises(BadFile, match="other records"):
        open_text(data, ENCODER, open_data(data))
    captions.unlink()
    with pytest.raises(BadFile, match=r"missing; python -m st_fast.prepare IMAGES .*/set --captions … writes it"):
        open_text(data, ENCODER, records)
    with pytest.raises(
        BadFile, match=r"manifest\.json: a data folder is needed, with captions\.jsonl; .* for --prompts"
    ):
        read_captions(manifest)


def test_damage_of_the_states_is_found_when_they_are_read(tmp_path: Path) -> None:
    data = make_data(tmp_path / "set")
    shard = text_folder(data, ENCODER) / "text-00000.safetensors"
    whole, row = shard.read_bytes(), LENGTH * WIDTH * 2
    first = whole.index(states_of([""]).numpy().tobytes())
    swapped = bytearray(whole)
    swapped[first : first + 2 * row] = whole[first + row : first + 2 * row] + whole[first : first + row]
    shard.write_bytes(swapped)
    text = open_text(data, ENCODER, open_data(data))
    with pytest.raises(BadFile, match="record 0"):
        text.null()
    with pytest.raises(BadFile, match="SHA-256"):
        text.verify()


def test_captions_in_any_script_come_back_as_they_were(tmp_path: Path) -> None:
    lines = [["👩🏽‍🚒 a firefighter", "مرحبا", "a\u2028b\x85c\nd"], ["\x00", ""], ["x" * 2**20]]
    (tmp_path / CAPTIONS).write_bytes(captions_bytes(lines))
    assert read_captions(tmp_path)[0] == lines
    assert captions_bytes([["é", "مر"], ["b"]]).decode() == '["é", "مر"]\n["b"]\n'


@pytest.fixture
def encoder(tmp_path: Path) -> TextEncoder:
    pytest.importorskip("transformers")
    return load_text_encoder(str(write_text_encoder(tmp_path / "bert")), CPU, torch.float32, 5)


def files(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in text_folder(data, "bert").iterdir()}


def test_written_states_are_the_encoders_and_interrupted_or_shared_writing_ends_with_the_same_files(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "SHARD_BYTES", 7 * 5 * 16 * 2)  # seven rows a shard
    sets = [make_data(tmp_path / name) for name in "abc"]
    told: list[str] = []
    text_module.write_text(sets[0], open_data(sets[0]), encoder, told.append, batch=3)
    texts = ["", *(text for line in LINES for text in line)]
    text = open_text(sets[0], "bert", open_data(sets[0]))
    text.verify()
    found = text.states(np.arange(len(texts)))
    torch.testing.assert_close(found.float(), encoder(texts), atol=2e-3, rtol=1e-3)
    manifest = text.manifest
    assert (manifest.encoder, manifest.hash, manifest.mask) == ("bert", encoder.hash, True)
    assert len(manifest.shards) == -(-len(texts) // 7)
    longer = sum(tokens > 5 for tokens in encoder.tokens(texts))
    assert told == [f"{longer} captions of more than 5 tokens, cut"] and longer > 1

    kept, calls = writing.write_tensors, []

    def failing(target: Path, tensors: dict[str, np.ndarray]) -> object:
        calls.append(target.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(target, tensors)

    monkeypatch.setattr(writing, "write_tensors", failing)
    with pytest.raises(KeyboardInterrupt):
        text_module.write_text(sets[1], open_data(sets[1]), encoder, told.append, batch=3)
    with pytest.raises(UserError, match="no complete text states"):
        open_text(sets[1], "bert", open_data(sets[1]))
    done: list[int] = []
    text_module.write_text(sets[1], open_data(sets[1]), encoder, told.append, batch=3, progress=done.append)
    assert sum(done) == len(texts)
    assert sorted(calls) == sorted([shard.file for shard in manifest.shards] + [manifest.shards[1].file])
    for rank, last in ((1, False), (0, True)):
        text_module.write_text(sets[2], open_data(sets[2]), encoder, told.append, batch=3, share=slice(rank, None, 2))
        assert (text_folder(sets[2], "bert") / "manifest.json").is_file() == last
    assert files(sets[0]) == files(sets[1]) == files(sets[2])
    last = text_folder(sets[2], "bert") / manifest.shards[-1].file
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    with pytest.raises(BadFile, match=f"{last.name}: its SHA-256"):
        open_text(sets[2], "bert", open_data(sets[2])).verify()
    folder = text_folder(sets[1], "bert")
    (folder / manifest.shards[0].file).unlink()
    os.truncate(folder / manifest.shards[2].file, 99)
    text_module.write_text(sets[1], open_data(sets[1]), encoder, told.append, batch=3)
    assert files(sets[0]) == files(sets[1]), "shards that were lost or cut off are made again"
    (folder / "job.json").unlink()
    with pytest.raises(UserError, match=r"holds shards and no job\.json .*; remove the folder"):
        text_module.write_text(sets[1], open_data(sets[1]), encoder, told.append, batch=3)
    other = load_text_encoder(str(tmp_path / "bert"), CPU, torch.float32, 6)
    with pytest.raises(UserError, match=r"begun with .*\(now "):
        text_module.write_text(sets[0], open_data(sets[0]), other, told.append)


def test_states_that_float16_cant_hold_and_captions_of_other_images_are_refused(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "set")
    with torch.no_grad():
        for parameter in encoder.model.encoder.layer[-1].output.LayerNorm.parameters():
            parameter += 70_000
    with pytest.raises(UserError, match="float16 can't hold"):
        text_module.write_text(data, open_data(data), encoder, print)
    (data / CAPTIONS).write_bytes(captions_bytes(LINES[:-1]))
    with pytest.raises(UserError, match="captions of 15 images, the latents are of 16"):
        text_module.write_text(data, open_data(data), encoder, print)
