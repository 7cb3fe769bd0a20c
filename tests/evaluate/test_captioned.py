"""Scores of samples drawn from text: what can't be scored is told before anything is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.evaluate import __main__ as evaluate
from st_fast.evaluate.attributes import Pictures
from tests import tiny_text
from tests.sample.test_prompts import Encoder
from tests.sample.test_prompts import encoder as encoder
from tests.sample.test_prompts import run as run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*arguments: object) -> None:
        raise AssertionError("it is drawn")

    monkeypatch.setattr(evaluate, "draw_set", draw)
    monkeypatch.setattr(evaluate.inception, "find_weights", lambda given: given)
    monkeypatch.setattr(evaluate.inception, "load_inception", lambda path, device: None)


def refused(run: Path, *options: str) -> str:
    with pytest.raises(UserError) as told:
        evaluate.main([str(run), "-n", "3000", *options])
    assert "\n" not in str(told.value)
    return str(told.value)


def test_prompts_that_no_real_picture_has_are_not_drawn_to_be_scored(
    run: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = Pictures(torch.zeros(1, 3, 8, 8).byte(), (("none", "none", "none"),), (("a fox",),), 1, "")
    monkeypatch.setattr(evaluate.attributes, "check_pictures", lambda data: pictures)
    (emoji := run.parent / "data" / "attributes.json").touch()
    assert "prompt 'x': not a caption of the real pictures" in refused(run, "--prompt", "a fox", "--prompt", "x")
    emoji.unlink()


def test_a_clip_that_can_not_score_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    bert = tiny_text.write_text_encoder(tmp_path / "bert")
    options = ("--inception", "w.pth", "--reference", str(tmp_path), "--clip", str(bert))
    assert "'clip' is needed" in refused(run, *options)
    monkeypatch.setattr(evaluate.clip_score, "load_clip", lambda name, device: None)
    wordless = tiny_text.make_data(tmp_path / "wordless")
    (wordless / "captions.jsonl").write_bytes(tiny_text.captions_bytes([["" for _ in i] for i in tiny_text.CAPTIONS]))
    tiny_text.write_states(wordless)
    assert "caption without a word" in refused(run, *options, "--captions", str(wordless))
