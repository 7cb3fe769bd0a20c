"""Files that may be broken or hostile are checked before they are believed, and written so that no crash shows half.

Shared by the checkpoints and the data; imports no torch.
"""

from st_fast.core.files.reading import (
    CHUNK,
    ITEM_BYTES,
    JSON_LIMIT,
    BadFile,
    Entry,
    inside,
    is_pickle,
    open_regular,
    parse_header,
    read_exactly,
    read_header,
    read_json,
    sha256_file,
    shown,
)
from st_fast.core.files.writing import (
    FolderWrite,
    durable_file,
    fsync_folder,
    json_bytes,
    make_folder,
    write_all,
    write_json_atomic,
)

__all__ = [
    "CHUNK",
    "ITEM_BYTES",
    "JSON_LIMIT",
    "BadFile",
    "Entry",
    "FolderWrite",
    "durable_file",
    "fsync_folder",
    "inside",
    "is_pickle",
    "json_bytes",
    "make_folder",
    "open_regular",
    "parse_header",
    "read_exactly",
    "read_header",
    "read_json",
    "sha256_file",
    "shown",
    "write_all",
    "write_json_atomic",
]
