"""What a model of text takes along into a folder: the empty caption's states, and whose states it was trained on."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import open_regular, shown
from st_fast.core.limits import read_npy
from st_fast.core.options import ARCHITECTURE_MOST
from st_fast.core.writing import save_pretrained
from st_fast.data.text import read_text_manifest
from st_fast.model.formats.loaded_state import NULL_CONTEXT
from st_fast.model.load import UNKNOWN_TEXT, TextStates
from st_fast.model.stored import ModelSource, alike, text_states
from st_fast.model.text_encoders import TextEncoder, check_encoder, load_text_encoder
from st_fast.recipe import load_run


def with_empty_context(origin: ModelSource, file: Path) -> ModelSource:
    """The model with the empty caption's states of a .npy file (L, W), U-ViT's empty_context.npy.

    UserError for a model that has them, or draws classes, and for states that don't fit.
    """
    loaded = origin.loaded
    if loaded.config.network == "sit":
        raise UserError(f"--empty-context: {origin.path} draws classes, not text")
    if NULL_CONTEXT in loaded.model:
        raise UserError(f"--empty-context: {origin.path} has the empty caption's states")
    with open_regular(file) as opened:
        array = read_npy(opened, file.stat().st_size, file)
    width, most = loaded.config.text_width, ARCHITECTURE_MOST["text_length"]
    fits = array.ndim == 2 and array.shape[1] == width and 1 <= len(array) <= most
    if not fits or array.dtype.kind != "f" or array.itemsize > 8:
        raise UserError(
            f"--empty-context {file}: {array.dtype} {shown(array.shape)}; floats (tokens, {width}) are needed"
        )
    null = torch.from_numpy(array.astype("float32"))[None]
    if not bool(torch.isfinite(null).all()):
        raise UserError(f"--empty-context {file}: holds NaN or infinity")
    model, ema = ({**table, NULL_CONTEXT: null} for table in (loaded.model, loaded.ema))
    config = replace(loaded.config, text_length=len(array))  # nothing else of a published model tells it
    return replace(origin, loaded=replace(loaded, config=config, model=model, ema=ema))


def check_empty_context(origin: ModelSource, form: str) -> None:
    """UserError if a model lacks the empty caption's states, without which nothing can be drawn with guidance."""
    if origin.loaded.config.network == "mmdit" and NULL_CONTEXT not in origin.loaded.model:
        raise UserError(
            f"{origin.path}: --to {form} needs the empty caption's states, which published models lack: "
            "--empty-context FILE.npy"
        )


def load_encoder(origin: ModelSource, name: str) -> tuple[TextEncoder, TextStates]:
    """A model's text encoder (a folder or hub name), and whose states those are.

    UserError where it can't be had, has another width, or other weights than the one that the model was trained with.
    Where nothing tells the weights, the model's own states of the empty caption do, and whether padding was masked.
    """
    config, text = origin.loaded.config, text_of(origin)
    found = load_text_encoder(name, torch.device("cpu"), torch.float32, config.text_length, text.mask)
    if found.width != config.text_width:
        raise UserError(f"--text-encoder {name}: {found.width} channels, the model has {config.text_width}")
    if text.hash:
        check_encoder(found, text.encoder, text.hash)
    elif not _reads_alike(found, origin.loaded.model[NULL_CONTEXT][0]):
        raise UserError(
            f"--text-encoder {name}: its states of the empty caption are not the model's, whose captions another "
            "encoder read"
        )
    return found, TextStates(text.encoder if text.hash else found.name, found.hash, found.mask)


def _reads_alike(encoder: TextEncoder, null: Tensor) -> bool:
    """Whether the encoder's states of the empty caption are those (L, W), with padding masked or not, as is kept."""
    for mask in (False, True):
        encoder.mask = mask
        if alike(encoder([""])[0], null):
            return True
    return False


def write_text_encoder(encoder: TextEncoder | None, folder: Path) -> dict[str, list[str | None]]:
    """The folders text_encoder and tokenizer, or neither, and what model_index.json calls them."""
    parts = {} if encoder is None else {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    for name, part in parts.items():
        save_pretrained(part, folder / name)
    return {
        name: ["transformers", type(parts[name]).__name__] if name in parts else [None, None]
        for name in ("text_encoder", "tokenizer")
    }


def text_of(origin: ModelSource) -> TextStates:
    """Whose states the model was trained on, where that is known: from its run's data, its folder, or as published."""
    config = origin.loaded.config
    if config.network == "sit":
        return UNKNOWN_TEXT
    if origin.run is not None:
        data = load_run(origin.run).data
        try:
            found = read_text_manifest(Path(data.path), data.text)
        except UserError:
            return UNKNOWN_TEXT
        return TextStates(found.encoder, found.hash, found.mask)
    return text_states(origin)
