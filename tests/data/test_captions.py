"""Captions come from where data sets keep them, each with its own image, and in any script."""

from __future__ import annotations

import codecs
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.data.captions import CAPTION_MOST, cleaned, coco_captions, read_source_captions, text_lines
from st_fast.data.source import Source
from st_fast.data.sources import open_source

from .conftest import encoded, picture
from .test_hub import Image as Column
from .test_hub import Table, Value, opened
from .test_sources import add, pack

TEXTS = [["a red fox", "one fox"], ["👩🏽‍🚒 في المطبخ"], ["three\u2028lines"], ["x" * 99]]


def captions(source: Source) -> list[Sequence[str]]:
    return read_source_captions(source.names, source.captions, 0, "here", lambda line: None)


@pytest.mark.parametrize("form", ["txt", "json", "json of others"])
@pytest.mark.parametrize("packing", ["folder", "a.zip", "a.tar", "shards"])
def test_captions_beside_images_in_any_packing(form: str, packing: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, lines in enumerate(TEXTS):
        name = f"{3 - number}.b{number}"  # a dot, which ends webdataset's keys
        (folder / f"{name}.jpg").write_bytes(encoded(picture(number), "JPEG"))
        if form == "txt":
            (folder / f"{name}.txt").write_bytes("\r\n".join(["", *lines]).encode("utf-8-sig"))
        else:
            keys = (
                {"caption": lines}
                if form == "json"
                else {"caption": None, "text": lines if lines[1:] else lines[0], "url": 1}
            )
            (folder / f"{3 - number}.json").write_text(json.dumps(keys))
    path = folder
    if packing == "shards":
        path = tmp_path / "shards"
        path.mkdir()
        for shard in range(2):
            with tarfile.open(path / f"{shard:05d}.tar", "w") as archive:
                for file in sorted(folder.iterdir())[4 * shard : 4 * shard + 4]:
                    add(archive, file.name, file.read_bytes())
    elif packing != "folder":
        path = pack(folder, tmp_path / packing)
    source = open_source(path, captioned=True)
    assert source.num_classes == 1 and source.labels.tolist() == [0] * 4 and not source.left_out
    assert captions(source) == TEXTS[::-1] and source.summary().endswith("): 4 images, all of one class")
    with pytest.raises(UserError, match=r"no label|lies in no class folder"):
        open_source(path)


def test_of_several_files_and_keys_the_nearest_counts(tmp_path: Path) -> None:
    files = {
        "1.a.txt": "its own", "1.txt": "of the key", "1.json": {"text": "of the table"},
        "2.json": {"prompt": "last", "text": "third", "captions": ["second"], "caption": " "}, "2.txt": "\n",
        "3.json": {"prompt": "the only one"},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for name in ("1.a", "1.b", "2", "3"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    found = captions(open_source(tmp_path, captioned=True))
    assert found == [["its own"], ["of the key"], ["second"], ["the only one"]]


def test_classes_stay_where_there_are_any(class_folders: Path) -> None:
    for path in class_folders.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"caption of {path.name}")
    source = open_source(class_folders, captioned=True)
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1] and source.class_names == ("b c", "été 中文")
    assert [line for (line,) in captions(source)] == [f"caption of {name.rpartition('/')[2]}" for name in source.names]
    assert source.digest() == open_source(class_folders).digest() and not source.left_out


@pytest.mark.parametrize("column", ["caption", "captions", "text"])
def test_captions_of_a_hugging_face_table(column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": {"bytes": b"x"}, column: TEXTS[0]}, {"image": {"bytes": b"y"}, column: "one"}]
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no ClassLabel columns"):
        opened(tmp_path, monkeypatch, Table(rows, image=Column(), **{column: Value()}))
    source = open_source(tmp_path, captioned=True)
    assert captions(source) == [TEXTS[0], ["one"]] and source.num_classes == 1 and source.read(1) == b"y"


def write_coco(path: Path, names: Sequence[str], lines: Sequence[Sequence[str]]) -> Path:
    """Annotations as COCO has them: ids that are no positions, captions in no order."""
    images = [{"id": 7 * number + 3, "file_name": name, "license": 1} for number, name in enumerate(names)]
    pairs = [(7 * number + 3, text) for number, some in enumerate(lines) for text in some]
    notes = [{"image_id": number, "id": 1, "caption": text} for number, text in sorted(pairs, key=lambda p: p[1][::-1])]
    path.write_text(json.dumps({"info": {}, "images": images[::-1], "annotations": notes}))
    return path


def test_captions_of_coco_go_to_the_images_of_their_names(tmp_path: Path) -> None:
    names = [f"COCO_train2014_{n:012d}.jpg" for n in (9, 25, 30)]
    path = write_coco(tmp_path / "captions.json", [*names, "elsewhere.jpg"], TEXTS)
    there = [f"train2014/{name}" for name in names[::-1]]
    found = read_source_captions(there, coco_captions(path, there), 0, "here", lambda line: None)
    assert [sorted(line) for line in found] == [sorted(line) for line in TEXTS[2::-1]]
    write_coco(path, ["a.jpg", "/val/a.jpg"], [["of no folder"], ["of val"]])
    there = ["coco/val/a.jpg", "coco/train/a.jpg", "coco/b.jpg"]
    found = coco_captions(path, there)
    assert [list(found(number)) for number in range(3)] == [["of val"], ["of no folder"], []]
    write_coco(path, [*names, "elsewhere.jpg"], TEXTS)
    there = [f"train2014/{name}" for name in names[::-1]]
    with pytest.raises(UserError, match=r"captions of none of the images; its first is of 'elsewhere.jpg'"):
        coco_captions(path, ["a.jpg"])
    with pytest.raises(UserError, match="that of several images"):
        coco_captions(path, [f"{part}/{names[0]}" for part in ("train", "val")])
    for key in ("id", "file_name"):
        document = json.loads(write_coco(path, names, TEXTS).read_text())
        document["images"][1][key] = document["images"][0][key]
        path.write_text(json.dumps(document))
        with pytest.raises(BadFile, match=rf"2 images have the {key} "):
            coco_captions(path, there)
    write_coco(path, names, TEXTS)
    with pytest.raises(BadFile, match="a caption is of image 24, none of those it lists"):
        coco_captions(path, there)
    for nameless in ("", "/"):
        write_coco(path, [*names[:2], nameless], TEXTS[:3])
        assert coco_captions(path, there)(0) == (), "no other image's captions"
    for wrong in ('{"images": [{"id": 1}], "annotations": []}', '{"images": [], "annotations": 3}', "{}", "[]", "\0"):
        path.write_text(wrong)
        with pytest.raises(BadFile) as refused:
            coco_captions(path, there)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_images_without_a_caption_are_counted_and_more_than_allowed_refused(tmp_path: Path) -> None:
    contents = [b"", b"\0\0 \n", b"{", None, b"good", b"\xff\0\xfe half \n"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(b"")
        if content is not None:
            (tmp_path / f"{number}.{'json' if content == b'{' else 'txt'}").write_bytes(content)
    source, told = open_source(tmp_path, captioned=True), list[str]()
    found = read_source_captions(source.names, source.captions, 4, "here", told.append)
    assert found == [("",)] * 4 + [["good"], ["\ufffd\ufffd half"]]
    assert told == [
        "here: 4 images without a caption; the first is '0.png' (none found); the empty caption stands for it",
        "2 captions of 6 images",
    ]
    with pytest.raises(UserError, match=r"4 images without a caption; .*--max-bad allows 3"):
        read_source_captions(source.names, source.captions, 3, "here", told.append)
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match=r"no image has a caption; a \.txt, or a \.json with"):
        read_source_captions(source.names, open_source(tmp_path, captioned=True).captions, 10, "here", told.append)


def test_a_caption_is_text_of_bounded_length() -> None:
    long = "\0 " + "ab" * CAPTION_MOST
    assert [len(text) for text in cleaned([long, 3, None, ["a"], "", "c"])] == [CAPTION_MOST, 1]
    assert cleaned("half \ud83d of a pair") == ["half ? of a pair"] and cleaned({"a": 1}) == []


def test_a_text_file_is_read_as_its_mark_says_and_only_line_ends_end_lines() -> None:
    lines = ["a red fox", "", "two\u2028\x0bß 👩🏽‍🚒"]
    marks = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    for form, mark in (("utf-8", b""), *marks.items()):
        for end in ("\n", "\r\n", "\r"):
            text = end.join(lines)
            for whole in (text, text + end):
                assert text_lines(mark + whole.encode(form)) == lines
    assert text_lines(b"") == [] and text_lines(b"\xff \0\n") == ["\ufffd \0"]
