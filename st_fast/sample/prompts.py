"""Prompts: the texts that samples are drawn from, and their states by the encoder of the run's data."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_fast.core.errors import Say, UserError
from st_fast.core.files import printable, read_bytes, shown
from st_fast.data.captions import CAPTION_MOST, sound, text_lines
from st_fast.data.text import TextManifest, TextSet, read_captions
from st_fast.model.load import TextStates
from st_fast.model.text_encoders import TextEncoder, check_encoder, load_text_encoder
from st_fast.recipe.schema import Model

PROMPTS_MOST = 1_000_000


class Prompts(ABC):
    """Texts with their states, which are made or read a batch at a time."""

    source = ""
    """The digest of the states that are read; "" where texts alone tell what is drawn."""

    def __init__(self, texts: Sequence[str], device: torch.device, negative: Tensor | None = None) -> None:
        self.texts, self.device, self._negative = tuple(texts), device, negative

    @abstractmethod
    def states(self, numbers: Tensor) -> Tensor:
        """(B, L, W) float32 on the device: the states of prompts number (B,)."""

    @abstractmethod
    def null(self) -> Tensor:
        """(L, W): the states of the empty caption by the encoder that these are of."""

    def negative(self, count: int) -> Tensor | None:
        """(count, L, W) the negative prompt's states; None without one."""
        return None if self._negative is None else self._negative.expand(count, -1, -1)


class EncodedPrompts(Prompts):
    """Texts that an encoder reads, each once."""

    def __init__(
        self, texts: Sequence[str], encoder: TextEncoder, device: torch.device, negative: str | None = None,
        stored: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """`stored`: the dtype of the data's states, to which these are rounded: a caption draws the same either way."""
        states = None if negative is None else encoder([negative]).to(stored).float().to(device)
        super().__init__(texts, device, states)
        self._encoder: TextEncoder | None = encoder
        self._stored, self._known = stored, dict[int, Tensor]()

    def states(self, numbers: Tensor) -> Tensor:
        wanted = numbers.tolist()
        if missing := sorted(set(wanted) - set(self._known)):
            if len(self._known) > 4 * len(wanted) + 1_000:
                self._known.clear()
                missing = sorted(set(wanted))
            assert self._encoder is not None, "all are known"
            states = self._encoder([self.texts[number] for number in missing]).to(self._stored).float().cpu()
            self._known.update(zip(missing, states, strict=True))
        return torch.stack([self._known[number] for number in wanted]).to(self.device)

    def null(self) -> Tensor:
        assert self._encoder is not None, "asked for before all are read"
        return self._encoder([""])[0]

    def read_all(self) -> None:
        """Reads every text now, and gives the encoder's memory back."""
        self.states(torch.arange(len(self.texts)))
        self._encoder = None


class StoredPrompts(Prompts):
    """Captions of a data folder, whose states are read from its shards: no encoder is needed, nor are the words."""

    def __init__(
        self, texts: Sequence[str], rows: np.ndarray, stored: TextSet, device: torch.device,
        negative: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(texts, device, negative)
        self._rows, self._stored, self.source = rows, stored, stored.digest

    def states(self, numbers: Tensor) -> Tensor:
        return self._stored.states(self._rows[numbers.cpu().numpy()]).float().to(self.device)

    def null(self) -> Tensor:
        return self._stored.null()


def spaced(count: int, images: int) -> np.ndarray:
    """`count` of so many images, evenly spaced, or all of them where there are fewer."""
    return np.unique(np.linspace(0, images - 1, min(count, images)).astype(np.int64))


def stored_prompts(
    data: Path, stored: TextSet, count: int, device: torch.device, negative: Tensor | None = None
) -> StoredPrompts:
    """The first captions of `count` images of a data folder, evenly spaced, with the states that are stored."""
    captions, _ = read_captions(data)
    chosen, views = spaced(count, len(captions)), len(stored.counts) // len(captions)
    rows = stored.first[chosen * views]
    return StoredPrompts([captions[image][0] for image in chosen.tolist()], rows, stored, device, negative)


def check_same_encoder(stored: TextSet, ours: TextManifest, data: Path) -> None:
    """UserError for states of another encoder, length or mask than those that a run is trained on.

    Where states came without a hash of the encoder ("") its name, or its folder's, must be the same.
    """
    theirs = stored.manifest
    hashed = bool(theirs.hash and ours.hash)

    def known(manifest: TextManifest) -> tuple[object, ...]:
        whose = manifest.hash if hashed else Path(manifest.encoder).name
        return whose, manifest.shape, manifest.mask

    def told(manifest: TextManifest) -> str:
        weights = f" (SHA-256 {manifest.hash[:12]})" if hashed else ""
        return f"of {shown(manifest.encoder)}{weights}, {manifest.length} tokens, mask {manifest.mask}"

    if known(theirs) != known(ours):
        raise UserError(f"{stored.folder}: states {told(theirs)}; those of {data} are {told(ours)}")


def states_manifest(text: TextStates, model: Model, encoder: str) -> TextManifest:
    """What a data folder's states would be described by, of a model without data; `encoder` where nothing names one.

    UserError where nothing does.
    """
    if not (name := text.encoder or encoder):
        raise UserError("--text-encoder FOLDER: needed, for nothing names the encoder whose states the model reads")
    shape = (1, model.text_length, model.text_width)
    return TextManifest(name, text.hash, shape, text.mask, "", "", 0, "float32")


def encoded_prompts(
    texts: Sequence[str], manifest: TextManifest, device: torch.device, say: Say, negative: str | None = None,
    encoder: str = "",
) -> EncodedPrompts:  # fmt: skip
    """Prompts read by the encoder that a data folder's states are of; `encoder` may say where it lies now.

    Prompts that are longer than a caption of the data are told, and cut. UserError where the encoder can't be had or
    has other weights.
    """
    name = encoder or manifest.encoder
    try:
        found = load_text_encoder(name, device, torch.float32, manifest.length, manifest.mask)
    except UserError as error:
        where = "--text-encoder FOLDER, or sample.text_encoder of a recipe, says where it lies"
        raise UserError(str(error) if encoder else f"{error}; {where}") from None
    check_encoder(found, manifest.encoder, manifest.hash)
    given = [*texts, *([] if negative is None else [negative])]
    cut = [text for text, tokens in zip(given, found.tokens(given), strict=True) if tokens > manifest.length]
    if cut:
        first = printable(cut[0][:60])
        say(f"warning: {len(cut)} of {len(given)} prompts have more than {manifest.length} tokens, cut: {first}…")
    return EncodedPrompts(texts, found, device, negative, getattr(torch, manifest.dtype))


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank; UserError for an empty or unreadable one."""
    return checked_prompts([line for line in map(sound, text_lines(read_bytes(path))) if line], str(path))


def checked_prompts(texts: Sequence[str], where: str) -> list[str]:
    """The prompts as captions are kept; UserError where there are none, too many, or one is no caption by its size."""
    if not texts:
        raise UserError(f"{where}: no prompt in it; a line a prompt is needed")
    if len(texts) > PROMPTS_MOST:
        raise UserError(f"{where}: {len(texts):,} prompts, at most {PROMPTS_MOST:,} are read")
    if (longest := max(texts, key=len)) and len(longest) > CAPTION_MOST:
        raise UserError(f"{where}: {shown(longest[:40])}…: {len(longest):,} characters, at most {CAPTION_MOST:,}")
    return list(map(sound, texts))
