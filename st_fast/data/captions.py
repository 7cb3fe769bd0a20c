"""Captions of a source's images: .txt or .json beside them, a column of a Hugging Face table, or COCO's annotations.

Text is kept as it is in any script; bytes that are no UTF-8 are replaced, null bytes and space around it removed.
"""

import codecs
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from st_fast.core.errors import Say, UserError, counted
from st_fast.core.files import FREE_BYTES, BadFile, parse_json, read_bytes, shown
from st_fast.core.machine import rank
from st_fast.core.progress import bar
from st_fast.data.archives import Files
from st_fast.data.labels import JSON_FACTOR, small

CAPTION_MOST = 2**20
"""Characters of a caption."""
KEYS = ("caption", "captions", "text", "prompt")
"""What captions are called in the .json beside an image and in a table's columns."""
KINDS = (".txt", ".json")
COCO = '{"images": [{"id", "file_name"}, …], "annotations": [{"image_id", "caption"}, …]}'
Captions = Callable[[int], Sequence[str]]
"""The captions of image i, none where it has none; OSError or `BadFile` where they can't be read."""


def text_lines(data: bytes) -> list[str]:
    """The lines of a text file, UTF-8 or, with the mark that says so, UTF-16; bytes that are neither are replaced.

    Only line feeds and carriage returns end a line, as in captions.jsonl: U+2028 stands for itself.
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n") if text else []


def sound(text: str) -> str:
    """A text as an encoder and a file can take it: no half of a surrogate pair, no null byte, no space around it."""
    return text.encode("utf-8", "replace").decode().replace("\0", "").strip()


def cleaned(found: object) -> list[str]:
    """A caption, or the captions in a list, each of CAPTION_MOST characters at most; what is no text is left out."""
    texts = found if isinstance(found, list | tuple) else [found]
    return [text for one in texts if isinstance(one, str) and (text := sound(one)[:CAPTION_MOST])]


def captions_beside(files: Files, images: Sequence[str]) -> Captions:
    """Those of the .txt beside image i, a line a caption, or else of its .json."""
    known = set(files.names)

    def read(number: int) -> Sequence[str]:
        folder, slash, file = images[number].rpartition("/")
        stems = dict.fromkeys((file.rpartition(".")[0], file.partition(".")[0]))  # the second is webdataset's
        names = [name for kind in KINDS for stem in stems if (name := f"{folder}{slash}{stem}{kind}") in known]
        for name in names:
            data = small(files, name)
            if name.endswith(".txt"):
                found: Any = text_lines(data)
            else:
                table = parse_json(data, Path(f"{files.where}: {shown(name)}"))
                found = next((captions for key in KEYS if (captions := cleaned(table.get(key)))), ())
            if captions := cleaned(found):
                return captions
        return ()

    return read


def coco_captions(path: Path, names: Sequence[str]) -> Captions:
    """Those that a file of COCO's annotations has for images of these names. `BadFile` for any other file.

    A name is found by its last folders and file, whatever folder of images it lies in.
    """
    data = read_bytes(path)
    document = parse_json(data, path, max(FREE_BYTES, JSON_FACTOR * len(data)))
    try:
        pairs = [(image["id"], image["file_name"].strip("/")) for image in document["images"]]
        for what, given in zip(("id", "file_name"), zip(*pairs, strict=True), strict=False):
            ((twice, times),) = Counter(given).most_common(1)
            if times > 1:
                raise BadFile(f"{path}: {times} images have the {what} {shown(twice)}; captions of which can't be told")
        files = dict(pairs)
        table: dict[str, list[str]] = {file: [] for file in files.values()}
        for annotation in document["annotations"]:
            if annotation["image_id"] not in files:
                raise BadFile(f"{path}: a caption is of image {shown(annotation['image_id'])}, none of those it lists")
            table[files[annotation["image_id"]]] += cleaned(annotation["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{path}: not COCO's captions, {COCO} ({type(error).__name__}: {shown(error)})") from None
    entries = list[str | None]()
    for name in names:
        parts = name.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        entries.append(next((end for end in ends if end in table), None))
    found = [entry for entry in entries if entry is not None]
    if not found:
        first = shown(next(iter(table), ""))
        raise UserError(
            f"{path}: captions of none of the images; its first is of {first}, the first image {names[0]!a}"
        )
    if len(set(found)) < len(found):
        ((twice, _),) = Counter(found).most_common(1)
        raise UserError(f"{path}: the name {shown(twice)} is that of several images; give the folder of one split")
    return lambda number: () if (entry := entries[number]) is None else table[entry]


def read_source_captions(
    names: Sequence[str], captions: Captions, max_bad: int, where: str, say: Say
) -> list[Sequence[str]]:
    """The captions of all images; one without gets the empty caption. UserError where these are more than `max_bad`."""
    lines, missing = list[Sequence[str]](), dict[str, str]()
    for number, name in enumerate(bar(names, "reading captions", len(names), "image", hidden=rank() != 0)):
        try:
            found, why = captions(number), "none found"
        except (OSError, BadFile) as error:
            found, why = (), str(error)
        if not found:
            missing[name] = why
        lines.append(found or ("",))
    if missing:
        name, why = next(iter(missing.items()))
        told = f"{where}: {counted(len(missing), 'image')} without a caption; the first is {name!a} ({why})"
        if len(missing) == len(names):
            kinds = f"a .txt, or a .json with {', '.join(KEYS)}, beside each image, or --captions FILE, is needed"
            raise UserError(f"{where}: no image has a caption; {kinds}")
        if len(missing) > max_bad:
            raise UserError(f"{told}; --max-bad allows {max_bad}")
        say(f"{told}; the empty caption stands for it")
    say(f"{counted(sum(map(len, lines)) - len(missing), 'caption')} of {counted(len(names), 'image')}")
    return lines
