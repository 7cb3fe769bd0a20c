"""Uploads a folder to the hub, on explicit request only. The hub library handles tokens: none is read here."""

import re
from pathlib import Path
from typing import Any

from st_fast.core.errors import RunFailed, UserError, first_line, how_to_install

TOKEN = re.compile(r"hf_\w+|(?i:bearer)\s+\S+")
"""What looks like one, should an error's text ever hold it."""


def hub() -> Any:
    """The hub with this machine's own login; UserError in one line where the package is missing."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(f"--push: huggingface_hub can't be imported ({error}): {how_to_install('hub')}") from None
    return HfApi()


def push(folder: Path, name: str, private: bool, api: Any) -> str:
    """Uploads a folder as one commit and returns its address. RunFailed in one line if the hub refuses or is away."""
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Written by st_fast")
    except Exception as error:  # the hub raises a dozen kinds; the folder is written, and a later push may succeed
        raise RunFailed(
            f"--push {name}: not uploaded ({TOKEN.sub('…', first_line(error))}); {folder} is written, the same command "
            "with --push again uploads it"
        ) from None
    return f"https://huggingface.co/{name}"
