"""Parquet files as the Hugging Face hub has them, `data/train-00000-of-00004.parquet`, as numbered images with labels.

They are read in place, a group of rows at a time, with pyarrow, which comes with the package datasets.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from st_fast.core.errors import UserError, first_line, how_to_install
from st_fast.core.files import BadFile, open_regular, parse_json, printable, shown
from st_fast.data.cards import names_on_card
from st_fast.data.source import Asked, Source
from st_fast.data.tables import IMAGE, LABEL, Column, Table, image_bytes, image_column, source_of

SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?|\d+|part[-.].*")
"""The name of one of several files; the split stands before the numbers, or else the folder is called so."""
GROUP_MOST = 2**31
"""Bytes of images in a group of rows, which is read as a whole."""
KEPT = 2
"""Groups in memory: reading in order needs the next one while threads are still busy with the last."""


def split_of(name: str) -> tuple[str, str]:
    """The folder and the split of a parquet file by its name: ("cifar", "train") of cifar/train-00000-of-00001.parquet.

    A file that is only numbered is of the split that its folder is called.
    """
    folder, _, file = name.rpartition("/")
    stem = file[: -len(".parquet")]
    shard = SHARD.fullmatch(stem)
    if shard is None or shard[1]:
        return folder, shard[1] if shard else stem
    folder, _, split = folder.rpartition("/")
    return folder, split


def files_of(where: str, names: Sequence[str], subset: str = "") -> list[str]:
    """The files of one split; UserError lists the splits where it has to be chosen.

    subset: the split, the folder that it lies in where that has no other, or both, as in "cifar100/train".
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        groups.setdefault(split_of(name), []).append(name)
    chosen = [key for key in groups if not subset or subset.strip("/") in (key[1], key[0], "/".join(filter(None, key)))]
    if len(chosen) == 1:
        return groups[chosen[0]]
    offered = chosen or list(groups)
    alike = len({split for _, split in offered}) < len(offered)  # splits of one name in several folders
    told = ["/".join(filter(None, key)) if alike else key[1] for key in offered]
    best = next((name for name in told if name.rpartition("/")[2].startswith("train")), told[0])
    choices = f"{', '.join(map(printable, told[:8]))}{', …' * (len(told) > 8)}"
    if not chosen:
        raise UserError(f"{where}: no split {subset!r}; it holds {choices}")
    raise UserError(f"{where}: it holds {choices}: choose one, --subset {printable(best)}")


class Group(NamedTuple):
    """Rows that a file has together."""

    file: Path
    number: int
    rows: int


def open_parquet(path: Path, names: Sequence[str], asked: Asked) -> Source:
    """The images in parquet files `names` of the folder `path`; `subset` chooses among several splits.

    UserError lists the splits or columns that there are.
    """
    where = f"source {str(path)!r}"
    chosen = [path / name for name in files_of(where, names, asked.subset)]
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{where}: parquet files, which the package pyarrow reads; it is not installed: {how_to_install('hub')}"
        ) from error
    groups, columns = list[Group](), list[Column]()
    images = ""
    for file in chosen:
        try:
            with _opened(file) as opened:
                found = columns_of(opened.schema_arrow)
                if columns and found != columns:
                    raise BadFile(f"{file}: other columns than {chosen[0].name}: {shown([c.name for c in found])}")
                columns = columns or found
                images = images or image_column(where, columns, asked.image_column).name
                groups += _groups(file, opened.metadata, images)
        except UserError:
            raise
        except Exception as error:  # pyarrow's own, by what is broken
            raise BadFile(f"{file}: not readable as parquet ({shown(first_line(error))})") from None
    reader = GroupReader(groups)
    split = asked.subset.strip("/")
    description = f"{path.name}{f'/{split}' * bool(split)} (parquet)"
    rows = int(reader.ends[-1]) if groups else 0
    return source_of(
        Table(
            where, description, columns, rows, reader.values, reader.image,
            lambda column: names_on_card(chosen[0]).get(column, ()),
        ),
        asked,
    )  # fmt: skip


def _opened(file: Path) -> Any:
    """A pyarrow ParquetFile; OSError or pyarrow's own errors where it is none."""
    from pyarrow.parquet import ParquetFile

    with open_regular(file):  # not a pipe, which would be waited for
        return ParquetFile(str(file))


def _groups(file: Path, metadata: Any, images: str) -> list[Group]:
    """A file's groups of rows; BadFile for one whose images would take too much memory."""
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = [group.column(i) for i in range(group.num_columns)]
        size = sum(p.total_uncompressed_size for p in parts if f"{p.path_in_schema}.".startswith(f"{images}."))
        if not 0 <= size <= GROUP_MOST:
            raise BadFile(
                f"{file}: {size:,} bytes of images in one group of rows, which are read together; at most "
                f"{GROUP_MOST:,} are: write it anew with a smaller row_group_size"
            )
        groups.append(Group(file, number, group.num_rows))
    if (rows := sum(group.rows for group in groups)) > (size := file.stat().st_size):
        raise BadFile(f"{file}: claims {rows:,} rows, in {size:,} bytes")
    return groups


def columns_of(schema: Any) -> list[Column]:
    """A pyarrow schema's columns: by Hugging Face's metadata where it has some, else by pyarrow's types."""
    told = dict[str, Any]()
    if text := (schema.metadata or {}).get(b"huggingface"):
        info = parse_json(text, Path("the schema's metadata of Hugging Face")).get("info")
        features = info.get("features") if isinstance(info, dict) else None
        told = features if isinstance(features, dict) else {}
    return [_column(field, told.get(field.name)) for field in schema]


def _column(field: Any, feature: Any) -> Column:
    feature = feature if isinstance(feature, dict) else {}
    kind, names = feature.get("_type"), feature.get("names")
    if kind == LABEL and isinstance(names, list):
        return Column(field.name, LABEL, tuple(map(str, names)))
    inner = [field.type.field(i) for i in range(field.type.num_fields)] if str(field.type).startswith("struct") else []
    has_bytes = any(part.name == "bytes" and str(part.type) in ("binary", "large_binary") for part in inner)
    return Column(field.name, IMAGE if has_bytes else str(field.type))


class GroupReader:
    """Rows of groups by number; `image` may be called from many threads, each group is read once while it is used."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.ends = np.cumsum([group.rows for group in groups])
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, str], Any] = OrderedDict()

    def values(self, column: str) -> list[Any]:
        """A column's values of all rows."""
        found = list[Any]()
        for file in dict.fromkeys(group.file for group in self.groups):
            with _opened(file) as opened:
                found += opened.read(columns=[column]).column(column).to_pylist()
        return found

    def image(self, column: str, row: int) -> bytes:
        """The bytes of a row's image; OSError where it has none or its group can't be read."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[number]) - self.groups[number].rows
        return image_bytes(_with_bytes(self._column(number, column)[row - first].as_py()))

    def _column(self, number: int, column: str) -> Any:
        with self._lock:
            if (number, column) not in self._kept:
                group = self.groups[number]
                try:
                    with _opened(group.file) as opened:
                        read = opened.read_row_group(group.number, columns=[column]).column(column)
                except Exception as error:  # pyarrow's own, by what is broken
                    raise OSError(f"{group.file.name}: rows of group {group.number}: {first_line(error)}") from None
                self._kept[number, column] = read
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return self._kept[number, column]


def _with_bytes(cell: Any) -> Any:
    """The cell, whose path is only a name: it leads to no file of this machine."""
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        raise OSError(f"no image in this row, only its name {shown(cell['path'])}")
    return cell
