"""A data set with captions, and a recipe, so small that a whole run takes a second; shared by the tests of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.files import make_folder
from st_fast.data.manifest import Manifest, VaeInfo, write_manifest
from st_fast.data.shards import open_data
from st_fast.data.text import TextManifest, captions_bytes, read_captions, text_folder
from st_fast.prepare.writing import record_crcs, write_shards, write_tensors
from tests.tiny import RECIPE as CLASSES

LENGTH, WIDTH, IMAGES = 4, 6, 16
ENCODER = "none/tiny-encoder"
RECIPE = CLASSES.replace(
    "num_classes = 5", f'network = "mmdit"\ntext_width = {WIDTH}\ntext_length = {LENGTH}\nqk_norm = true'
)
CAPTIONS = [[f"a picture, number {i}", *(f"number {i}, once more ({k})" for k in range(i % 3))] for i in range(IMAGES)]


def states_of(texts: Sequence[str]) -> Tensor:
    """(n, L, W) float16: numbers that follow from the texts."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(hash_of(text))
        rows.append(torch.randn(LENGTH, WIDTH, generator=generator))
    return torch.stack(rows).half()


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-7:], "big")


def make_data(folder: Path, flip: bool = False) -> Path:
    """Latents of 16 images (32 records with `flip`), their captions and the states of these."""
    records = IMAGES * (1 + flip)
    moments = torch.rand(records, 8, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    manifest = Manifest(0, (8, 4, 4), "float16", 1.0, VaeInfo("none"), "random", 1, flip)
    write_shards(folder, [(moments, torch.zeros(records, dtype=torch.int64))], manifest)
    (folder / "captions.jsonl").write_bytes(captions_bytes(CAPTIONS))
    write_states(folder)
    return folder


def write_states(folder: Path, encoder: str = ENCODER, mask: bool = True, number: int | None = None) -> None:
    """States of the captions, as the encoder of that name would have made them; of `number`s, where given."""
    captions, digest = read_captions(folder)
    texts = ["", *(text for line in captions for text in line)]
    where = text_folder(folder, encoder)
    make_folder(where)
    words = texts if number is None else ["", *(f"{number} {row}" for row in range(1, len(texts)))]
    states = states_of(words).numpy()[:, None]
    tensors = {"states": states, "crc32": record_crcs(states, torch.arange(len(texts)).numpy())}
    entry = write_tensors(where / "text-00000.safetensors", tensors)
    shape, latents = (1, LENGTH, WIDTH), open_data(folder, verify=False).digest
    write_manifest(where, TextManifest(encoder, "0" * 64, shape, mask, digest, latents, len(texts), shards=(entry,)))


def _families() -> dict[str, tuple[Any, Any]]:
    """Tiny text models of each kind by name: a configuration and the class of its text encoder."""
    try:
        import transformers as hf
    except ImportError:
        return {}
    size: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    t5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    gemma = hf.GemmaConfig(**size, num_key_value_heads=1, head_dim=8, max_position_embeddings=96)
    return {
        "clip": (hf.CLIPTextConfig(**size), hf.CLIPTextModel),
        "t5": (hf.T5Config(**t5), hf.T5EncoderModel),
        "bert": (hf.BertConfig(**size, max_position_embeddings=40), hf.BertModel),
        "gemma": (gemma, hf.GemmaModel),
    }


FAMILIES = _families()
WORDS = ["a", "red", "fox", "number", "picture", "once", "more", "one", "two", "three", "four", "five", "six"]
WORDS += ["seven", "eight"]


def write_text_encoder(folder: Path, family: str = "bert", seed: int = 0) -> Path:
    """A random text encoder 16 wide, and a tokenizer that knows WORDS and ends each text with </s>."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}  # Gemma's own
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    config, model = FAMILIES[family]
    model(config).save_pretrained(folder)
    return folder
