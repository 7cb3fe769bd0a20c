"""CLIP score against the definition, with a tiny CLIP; nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from st_fast.core.errors import UserError
from st_fast.evaluate.clip_score import BATCH, load_clip
from st_fast.model.encoders import CLIP
from st_fast.model.vae import tensors_hash
from tests.tiny_text import write_text_encoder

hf = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def write_clip(folder: Path) -> Path:
    """A tiny CLIP of random weights in `folder`."""
    write_text_encoder(folder, "clip")
    torch.manual_seed(0)
    text = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 9,
    }  # fmt: skip
    vision = text | {"image_size": 16, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_clip(tmp_path)


def test_it_is_a_hundred_times_the_cosine_where_that_is_positive_and_long_texts_are_cut(folder):
    count = BATCH + 3
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    texts = [("a red fox " * (1 + i % 5)).strip() for i in range(count)]
    model, tokenizer = hf.CLIPModel.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP.mean, CLIP.std))
    expected = []
    for image, text in zip(images, texts, strict=True):
        ids = tokenizer(text, truncation=True, max_length=9, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model(pixel_values=((image / 255 - mean) / std)[None], input_ids=ids)
        expected.append(100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp_min(0)[0])
    found = load_clip(str(folder), CPU)(images, texts)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-3)
    assert (found == 0).any() and (found > 0).any()
    assert found.std() > 0.1


def test_what_is_no_clip_is_refused_in_one_line(folder, tmp_path_factory):
    other = write_text_encoder(tmp_path_factory.mktemp("other"), "bert")
    weights = load_file(folder / "model.safetensors")
    first = load_clip(str(folder), CPU)
    assert (first.name, first.hash) == (folder.name, tensors_hash(weights))
    key = "text_projection.weight"
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in weights.items() if k != key}, f"1 weights are missing: {key}"),
        (weights | {key: weights[key] / 0}, "NaN or infinite"),
        ({}, "neither a folder with a CLIP in safetensors"),
    ]
    refused = [(other, "'clip' is needed")]
    for some, words in changes:
        changed = Path(shutil.copytree(folder, tmp_path_factory.mktemp("changed"), dirs_exist_ok=True))
        refused.append((changed, words))
        if some:
            save_file(some, changed / "model.safetensors", {"format": "pt"})
        else:  # a pickle, which is never read
            torch.save(weights, changed / "pytorch_model.bin")
            (changed / "model.safetensors").unlink()
    for path, words in refused:
        with pytest.raises(UserError, match=words) as raised:
            load_clip(str(path), CPU)
        assert "\n" not in str(raised.value)
