"""A Hugging Face dataset on disk (`save_to_disk`) as numbered images with labels."""

from pathlib import Path
from typing import Any

from st_fast.core.errors import UserError, first_line, how_to_install
from st_fast.core.files import printable, shown
from st_fast.data.source import Asked, Source
from st_fast.data.tables import IMAGE, LABEL, Column, Table, image_bytes, source_of


def open_hub_dataset(path: Path, asked: Asked) -> Source:
    """Its image and label columns; `subset` names a split. UserError lists the splits or columns that there are."""
    where = f"source {str(path)!r}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{where}: a Hugging Face dataset, which the package datasets reads; it is not installed: "
            f"{how_to_install('hub')}"
        ) from error
    try:
        data: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's and json's own, by what is broken
        raise UserError(f"{where}: not a readable Hugging Face dataset ({shown(first_line(error))})") from None
    subset = asked.subset
    if isinstance(data, datasets.DatasetDict):
        splits = ", ".join(map(printable, data))
        if not subset and len(data) > 1:
            raise UserError(f"{where}: it holds {splits}: choose one, --subset {printable(next(iter(data)))}")
        if subset and subset not in data:
            raise UserError(f"{where}: no split {subset!r}; it holds {splits or 'none'}")
        data = data[subset or next(iter(data))]
    elif subset and subset != str(getattr(data, "split", "")):
        raise UserError(f"{where}: --subset {subset}: it has no splits; leave --subset out")
    columns = [_column(datasets, name, feature) for name, feature in data.features.items()]
    images = dict[str, Any]()  # by column, undecoded and without the other columns

    def image(column: str, row: int) -> bytes:
        if column not in images:
            kind = data.features[column]
            table = data.cast_column(column, datasets.Image(decode=False)) if isinstance(kind, datasets.Image) else data
            images[column] = table.select_columns([column])
        return image_bytes(images[column][row][column])

    table = Table(
        where, f"{path.name} (Hugging Face dataset)", columns, len(data), lambda name: list(data[name]), image
    )
    return source_of(table, asked)


def _column(datasets: Any, name: str, feature: Any) -> Column:
    if isinstance(feature, datasets.Image):
        return Column(name, IMAGE)
    if isinstance(feature, datasets.ClassLabel):
        return Column(name, LABEL, tuple(map(str, feature.names or ())))
    return Column(name, str(getattr(feature, "dtype", type(feature).__name__)))
