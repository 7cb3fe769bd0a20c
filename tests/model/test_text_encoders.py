"""Text encoders: the last hidden states as transformers' own models give them, padded, cut and masked as said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.model.stored import alike
from st_fast.model.text_encoders import PACKAGED, check_encoder, load_text_encoder
from tests.tiny_text import FAMILIES, write_text_encoder

CPU = torch.device("cpu")
TEXTS = ["a red fox", "", "one two three four five six seven eight"]
pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [False, True])
def test_states_are_the_last_hidden_ones_and_of_padding_zero_only_where_it_is_masked(
    family: str, mask: bool, tmp_path: Path
) -> None:
    import transformers

    path = write_text_encoder(tmp_path / family, family)
    encoder = load_text_encoder(str(path), CPU, torch.float32, 6, mask)
    found = encoder(TEXTS)
    assert found.shape == (3, 6, encoder.width) and found.dtype == torch.float32 and encoder.mask is mask
    assert encoder.tokens(TEXTS) == [4, 1, 9] and encoder.name == family
    model = FAMILIES[family][1].from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text, states in zip(TEXTS, found, strict=True):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        ids = torch.cat((ids[:, : min(ids.shape[1], 6) - 1], ids[:, -1:]), 1)  # the end's token stays
        padding = torch.full((1, 6 - ids.shape[1]), tokenizer.pad_token_id)
        with torch.no_grad():
            alone = model(input_ids=ids).last_hidden_state[0]
            padded = model(input_ids=torch.cat((ids, padding), 1)).last_hidden_state[0]
        if mask:  # padding changes nothing then, and its own states are zeros
            torch.testing.assert_close(states[: len(alone)], alone, atol=1e-5, rtol=1e-4)
            assert not states[len(alone) :].any()
        else:
            torch.testing.assert_close(states, padded, atol=1e-5, rtol=1e-4)
            assert states[len(alone) :].abs().sum() > 0 or not padding.numel()


def test_length_and_mask_are_the_families_own_where_none_are_named(tmp_path: Path) -> None:
    said = {}
    for family in FAMILIES:
        encoder = load_text_encoder(str(write_text_encoder(tmp_path / family, family)), CPU, torch.float32)
        said[family] = (encoder.length, encoder.mask)
    assert said == {"clip": (77, False), "t5": (128, True), "bert": (40, True), "gemma": (96, True)}


def settings_changed(folder: Path, **values: object) -> None:
    """Changes the tokenizer's settings; None removes one."""
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if path.is_file():
            known = json.loads(path.read_text()) | values
            path.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))


def test_a_tokenizers_limit_counts_too_and_relative_positions_have_none(tmp_path: Path) -> None:
    path = write_text_encoder(tmp_path / "bert", "bert")
    settings_changed(path, model_max_length=9, pad_token=None)
    encoder = load_text_encoder(str(path), CPU, torch.float32)
    assert encoder.length == 9 and encoder(TEXTS).shape == (3, 9, 16), "padded though no token is meant for it"
    with pytest.raises(UserError, match="10 tokens a caption; 1 to 9"):
        load_text_encoder(str(path), CPU, torch.float32, 10)
    t5 = load_text_encoder(str(write_text_encoder(tmp_path / "t5", "t5")), CPU, torch.float32, 200)
    assert t5(TEXTS[:1]).shape == (1, 200, 16)


def test_the_hash_is_that_of_the_files_weights_whatever_the_encoder_computes_in(tmp_path: Path) -> None:
    path = str(write_text_encoder(tmp_path / "bert", "bert"))
    whole, half = (load_text_encoder(path, CPU, dtype, 6) for dtype in (torch.float32, torch.bfloat16))
    check_encoder(half, "bert", whole.hash)
    assert whole(TEXTS).dtype == half(TEXTS).dtype == torch.float32
    torch.testing.assert_close(half(TEXTS), whole(TEXTS), atol=0.1, rtol=0)
    assert not torch.equal(half(TEXTS), whole(TEXTS)) and alike(half([""])[0], whole([""])[0])
    other = load_text_encoder(str(write_text_encoder(tmp_path / "other", "bert", seed=1)), CPU, torch.float32, 6)
    assert not alike(other([""])[0], whole([""])[0]), "what tells encoders apart where no hash does"


def test_of_a_whole_clip_the_text_model_is_taken(tmp_path: Path) -> None:
    import transformers as hf

    write_text_encoder(tmp_path, "clip")
    text = FAMILIES["clip"][0].to_dict() | {"max_position_embeddings": 9}
    vision = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path), CPU, torch.float32)
    assert (encoder.length, encoder.width, encoder.mask) == (9, 16, False)
    ids = encoder.tokenizer(TEXTS, padding="max_length", max_length=9, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.text_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder(TEXTS), expected)


def test_an_encoder_that_cant_be_had_or_is_another_is_told_in_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_text_encoder(tmp_path / "bert", "bert")
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[str, int | None, str]] = [
        ("empty", None, "neither a folder"), ("missing", None, "neither a folder"),
        ("bert", 41, "41 tokens a caption; 1 to 40"), ("bert", 0, "0 tokens a caption"),
    ]  # fmt: skip
    for name, length, words in wrong:
        with pytest.raises(UserError) as refused:
            load_text_encoder(str(tmp_path / name), CPU, torch.float32, length)
        assert words in str(refused.value) and "\n" not in str(refused.value) and name in str(refused.value)
    encoder = load_text_encoder(str(path), CPU, torch.float32)
    other = load_text_encoder(str(write_text_encoder(tmp_path / "other", "bert", seed=1)), CPU, torch.float32)
    check_encoder(encoder, "bert", encoder.hash)
    with pytest.raises(UserError, match=r"'other': other weights .* than those that encoded"):
        check_encoder(other, "bert", encoder.hash)
    weights = load_file(path / "model.safetensors")
    key = next(key for key in weights if "layer.0.attention" in key)
    save_file({k: v for k, v in weights.items() if k != key}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"1 weights are missing: .*{key.rpartition('encoder')[2]}"):
        load_text_encoder(str(path), CPU, torch.float32)
    save_file(weights | {key: weights[key] / 0}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite"):
        load_text_encoder(str(path), CPU, torch.float32)
    torch.save(weights, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither a folder with a text encoder in safetensors"):
        load_text_encoder(str(path), CPU, torch.float32)


def test_a_tokenizer_that_is_not_the_models_or_cant_pad_is_told_in_one_line(tmp_path: Path) -> None:
    import transformers

    path = write_text_encoder(tmp_path / "small")
    config = transformers.AutoConfig.from_pretrained(path, vocab_size=6)
    transformers.BertModel(config).save_pretrained(path)
    encoder = load_text_encoder(str(path), CPU, torch.float32)
    assert encoder(["a red"]).shape == (1, 40, 16)
    with pytest.raises(UserError, match="'small': its tokenizer gives token 6, the model knows 6"):
        encoder(["a red fox"])
    file = write_text_encoder(tmp_path / "plain") / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if not key.endswith("_token")}
    file.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="'plain': its tokenizer names no token to pad with"):
        load_text_encoder(str(file.parent), CPU, torch.float32)


@pytest.mark.skipif(not importlib.util.find_spec("all_minilm_l6_v2"), reason="the extra emoji isn't installed")
def test_the_packaged_sentence_encoder_is_the_published_one() -> None:
    """Its model card's first figures of the sentence, the mean over tokens, normalised."""
    encoder = load_text_encoder(PACKAGED, CPU, torch.float32)
    states = encoder(["This is an example sentence", "an octopus", "a squid", "a tax form"])
    assert (encoder.width, encoder.mask, encoder.name) == (384, True, PACKAGED)
    vectors = torch.nn.functional.normalize(states.sum(1), dim=-1)  # padding is zero, and the count cancels
    published = torch.tensor([0.0676569, 0.0634959, 0.0487131, 0.0793049])
    torch.testing.assert_close(vectors[0, :4], published, atol=1e-4, rtol=0)
    assert vectors[1] @ vectors[2] > vectors[1] @ vectors[3] + 0.2
