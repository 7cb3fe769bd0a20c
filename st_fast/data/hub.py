"""Images out of a folder that Hugging Face `datasets` wrote with `save_to_disk`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.errors import UserError
from st_fast.data.source import Source


def open_hub_dataset(path: Path, subset: str = "") -> Source:
    """The image and label columns of the dataset at `path`; `subset` names a split where there are several."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"source {str(path)!r}: a Hugging Face dataset, which the package datasets reads; it is not installed: "
            'pip install "st_fast[hub]"'
        ) from error
    data: Any = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if subset not in data and len(data) > 1:
            splits = ", ".join(data)
            raise UserError(f"source {str(path)!r}: it holds {splits}: choose one, --subset {next(iter(data))}")
        data = data[subset or next(iter(data))]
    image = _column(path, data.features, datasets.Image, "image")
    label = _column(path, data.features, datasets.ClassLabel, "label")
    data = data.cast_column(image, datasets.Image(decode=False))
    labels = np.array(data[label], np.int64)
    names = tuple(getattr(data.features[label], "names", None) or ())

    def read(number: int) -> bytes:
        cell = data[number][image]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return Source(
        f"{path.name} (Hugging Face dataset)",
        [f"row {number}" for number in range(len(data))],
        labels,
        len(names) or int(labels.max(initial=0)) + 1,
        names,
        read,
    )


def _column(path: Path, features: Any, kind: type, fallback: str) -> str:
    """The column of that kind, or the one with the usual name."""
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if fallback in features:
        return fallback
    raise UserError(f"source {str(path)!r}: no {kind.__name__} column; it has {', '.join(features)}")
