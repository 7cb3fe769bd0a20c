"""From captioned images to the states that training reads, by the commands as they are typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.data.shards import open_data
from st_fast.data.text import CAPTIONS, open_text, read_captions
from st_fast.model.text_encoders import load_text_encoder
from tests.data.test_captions import write_coco
from tests.tiny_text import write_text_encoder

from .conftest import encoded, picture, run

TEXTS = [["a red fox", "one fox"], ["left out"], ["two\u2028👩🏽‍🚒"], ["three four five six seven"]]


def encode(source: Path, out: Path, *options: object) -> None:
    run(source, out, "--size", 8, "--vae", "pixels", "--device", "cpu", "--shard-size", 3, *options)


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Four images of which the second is none, each with a .txt."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, lines in enumerate(TEXTS):
        content = b"no image" if number == 1 else encoded(picture(number))
        (folder / f"{number}.png").write_bytes(content)
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("flip", [False, True])
def test_every_record_gets_the_states_of_its_own_captions(
    flip: bool, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out, path = tmp_path / "out", write_text_encoder(tmp_path / "bert")
    encode(captioned, out, "--captions", "auto", *["--flip"] * flip)
    kept = [TEXTS[0], TEXTS[2], TEXTS[3]]
    assert read_captions(out)[0] == kept
    assert "5 captions of 4 images" in (told := capsys.readouterr().out) and "not an image" not in told
    options = ("--text", path, out, "--text-length", 5, "--device", "cpu", "--batch-size", 2)
    run(*options, "--dry-run")
    assert "4 captions of 5 tokens × 16 in float16, with attention mask" in capsys.readouterr().out
    assert not (out / "text").exists()
    run(*options)
    assert "1 caption of more than 5 tokens, cut" in (both := capsys.readouterr()).out + both.err
    assert f"train: python -m st_fast.train recipes/mmdit_coco.toml --data.path={out} " in both.out
    assert "--model.text_width=16 --model.text_length=5" in both.out
    text, records = open_text(out, "bert", open_data(out)), open_data(out)
    encoder = load_text_encoder(str(path), torch.device("cpu"), torch.float32, 5)
    for record in range(len(records)):
        for share, which in ((0.0, 0), (0.99, -1)):
            found = text.states(text.rows_of(np.array([record]), np.array([share])))
            expected = encoder([kept[record // (1 + flip)][which]])
            torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-3)
    run("--verify", out)
    assert "text: bert of 4 captions verified" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"begun with .*mask"):
        run(*options, "--text-mask", "no")


def test_captions_are_added_to_a_finished_set_and_other_ones_refused(captioned: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled"
    (labelled / "fox").mkdir(parents=True)
    for path in captioned.glob("*.png"):
        (labelled / "fox" / path.name).write_bytes(path.read_bytes())
    encode(labelled, tmp_path / "out")
    assert not (tmp_path / "out" / CAPTIONS).exists()
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    notes = write_coco(tmp_path / "captions.json", [f"{n}.png" for n in range(4)], TEXTS)
    encode(labelled, tmp_path / "out", "--captions", notes)
    assert [sorted(line) for line in read_captions(tmp_path / "out")[0]] == [TEXTS[0], TEXTS[2], TEXTS[3]]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    write_coco(notes, [f"{n}.png" for n in range(4)], TEXTS[::-1])
    with pytest.raises(UserError, match="other captions than those found now"):
        encode(labelled, tmp_path / "out", "--captions", notes)
    with pytest.raises(UserError, match=r"4 images? without a caption|captions of none of the images"):
        encode(labelled, tmp_path / "more", "--captions", write_coco(notes, ["x.png"], TEXTS[:1]))
    assert not (tmp_path / "more").exists()


def test_states_without_captions_are_refused_in_one_line(captioned: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (captioned / "1.png").unlink()
    for path in captioned.glob("*.txt"):
        path.write_text("")
    with pytest.raises(UserError, match="no image has a caption"):
        encode(captioned, tmp_path / "out", "--captions", "auto")
    folder = tmp_path / "set" / "fox"
    folder.mkdir(parents=True)
    (captioned / "0.png").rename(folder / "0.png")
    encode(folder.parent, tmp_path / "out")
    with pytest.raises(UserError, match=r"captions\.jsonl: missing"):
        run("--text", write_text_encoder(tmp_path / "bert"), tmp_path / "out", "--device", "cpu")
