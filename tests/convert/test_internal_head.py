"""Internal Guidance's published layout, and models with an internal head in every form that others read."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from st_fast import kernels
from st_fast.convert.__main__ import main
from st_fast.core.errors import UserError
from st_fast.model import SiT, build
from st_fast.model.formats.importing import import_file
from st_fast.model.stored import read_model
from st_fast.recipe.schema import Sample
from st_fast.sample.draw import draw_of, read_labels
from st_fast.sample.guided import sample
from tests import foreign, warm

DEPTH, WIDTH = 3, 32
CPU = torch.device("cpu")


def names() -> dict[str, tuple[int, ...]]:
    """The published parameters in the order in which CVL-UESTC/Internal-Guidance registers them, with shapes."""
    d = WIDTH
    sizes = {"x_embedder.proj": (d, 4, 2, 2), "t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    found: dict[str, tuple[int, ...]] = {"pos_embed": (1, 4, d)}

    def layers(table: dict[str, tuple[int, ...]]) -> None:
        for name, shape in table.items():
            found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    layers(sizes)
    found["y_embedder.embedding_table.weight"] = (6, d)
    for number in range(DEPTH):
        block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d),
                 "adaLN_modulation.1": (6 * d, d)}  # fmt: skip
        layers({f"blocks.{number}.{name}": shape for name, shape in block.items()})
    for layer in ("final_layer_xr", "final_layer"):
        layers({f"{layer}.linear": (16, d), f"{layer}.adaLN_modulation.1": (2 * d, d)})
    return found


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in names().items()}
    return drawn | {"pos_embed": foreign.trunk(foreign.TINY, 1)["pos_embed"]}


def published(path: Path, **args: object) -> dict:
    """The released training script's checkpoint; it writes no encoder depth among its args."""
    model = weights(1)
    told = {"model": "SiT-XL/2", "num_classes": 5, "prediction": "v", "path_type": "linear", "qk_norm": False} | args
    content = {
        "model": model, "ema": weights(2), "opt": foreign.adamw_state(model, 3), "args": argparse.Namespace(**told),
        "epoch": 7, "steps": 12_345,
    }  # fmt: skip
    torch.save(content, path)
    return content


def reread(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def test_the_published_layout_goes_through_a_stage_of_ours_and_back_bit_by_bit(tmp_path, capsys):
    content = published(tmp_path / "ig.pt", encoder_depth=2)
    main([str(tmp_path / "ig.pt"), str(tmp_path / "stage"), "--heads", "2"])
    told = capsys.readouterr().out
    assert "internal head after block 2" in told and "training heads: none" in told and "step 12,345" in told
    assert "internal_head" not in told.partition("for a recipe:")[2]  # there a method adds it
    loaded = read_model(tmp_path / "stage", print).loaded
    assert loaded.config.internal_head == 2
    for name in ("model", "ema"):
        assert all(torch.equal(getattr(loaded, name)[key], tensor) for key, tensor in content[name].items())
    main([str(tmp_path / "stage"), str(tmp_path / "again.pt"), "--to", "repa"])
    again = reread(tmp_path / "again.pt")
    assert list(again["model"]) == list(content["model"]) == list(again["ema"])
    for number, state in content["opt"]["state"].items():
        assert all(torch.equal(again["opt"]["state"][number][key], state[key]) for key in ("exp_avg", "exp_avg_sq"))
    assert vars(again["args"])["encoder_depth"] == 2 and again["steps"] == 12_345 and "epoch" in again
    assert import_file(tmp_path / "again.pt", number_of_heads=2).config == loaded.config


def test_its_velocities_are_those_of_the_file(tmp_path):
    published(tmp_path / "ig.pt", encoder_depth=1)
    loaded = import_file(tmp_path / "ig.pt", number_of_heads=2)
    model = build(loaded.config, kernels.select({}, CPU), 0).eval()
    model.load_state_dict(dict(loaded.ema))
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.9]), torch.tensor([3, 5])
    _, stream = model(x, t, y, 1)
    _, internal = model(x, t, y, -1)
    w = weights(2)
    c = model.t_embedder(t) + model.y_embedder(y)
    mod = torch.nn.functional.silu(c) @ w["final_layer_xr.adaLN_modulation.1.weight"].T
    shift, scale = (mod + w["final_layer_xr.adaLN_modulation.1.bias"])[:, None].chunk(2, dim=-1)
    normed = torch.nn.functional.layer_norm(stream, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    out = (normed @ w["final_layer_xr.linear.weight"].T + w["final_layer_xr.linear.bias"]).view(2, 2, 2, 2, 2, 4)
    expected = torch.einsum("nhwpqc->nchpwq", out).reshape(2, 4, 4, 4)
    torch.testing.assert_close(internal, expected, atol=1e-4, rtol=1e-4)


def test_the_block_is_8_where_the_file_does_not_say_it_and_can_be_given(tmp_path):
    published(tmp_path / "ig.pt")
    with pytest.raises(UserError, match=r"of block 8: one of its blocks 1 to 3 is needed .*--internal-head"):
        import_file(tmp_path / "ig.pt", number_of_heads=2)
    assert import_file(tmp_path / "ig.pt", number_of_heads=2, internal_head=1).config.internal_head == 1
    main([str(tmp_path / "ig.pt"), str(tmp_path / "stage"), "--heads", "2", "--internal-head", "3"])
    assert read_model(tmp_path / "stage", print).loaded.config.internal_head == 3


def test_a_bare_table_with_the_head_is_known_by_it(tmp_path):
    save_file({f"module.{key}": tensor for key, tensor in weights(1).items()}, tmp_path / "ig.safetensors")
    found = import_file(tmp_path / "ig.safetensors", number_of_heads=2, num_classes=5, internal_head=2)
    assert found.layout == "repa" and found.config.internal_head == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--internal-head", "4"), "of block 4: one of its blocks 1 to 3 is needed"),
        (("--internal-head", "0"), "--internal-head 0: at least 1"),
        (("--internal-head", "2", "--from", "sit"), "internal head .* which sit has no place for"),
        (("--internal-head", "2", "--from", "sra"), "internal head .* which sra has no place for"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, words, message):
    published(tmp_path / "ig.pt")
    with pytest.raises(UserError, match=message) as told:
        main([str(tmp_path / "ig.pt"), str(tmp_path / "out"), "--heads", "2", *words])
    assert "\n" not in str(told.value)


def test_a_block_for_a_file_without_the_head_or_for_a_folder_is_refused(tmp_path):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    with pytest.raises(UserError, match="internal_head = 2: it has no internal head"):
        main([str(tmp_path / "last.pt"), "--internal-head", "2"])
    main([str(tmp_path / "last.pt"), str(tmp_path / "stage")])
    with pytest.raises(UserError, match=r"--internal-head 2: .* tells it itself"):
        main([str(tmp_path / "stage"), "--internal-head", "2"])


@pytest.mark.parametrize("layout", ["sit", "sra", "self-transcendence"])
def test_layouts_whose_code_knows_no_such_head_are_not_written(tmp_path, layout):
    published(tmp_path / "ig.pt", encoder_depth=2)
    main([str(tmp_path / "ig.pt"), str(tmp_path / "stage"), "--heads", "2"])
    with pytest.raises(UserError, match=f"{layout}'s own code knows no internal head; --to repa keeps it"):
        main([str(tmp_path / "stage"), str(tmp_path / "out.pt"), "--to", layout])
    assert not (tmp_path / "out.pt").exists()


PROGRAM = """
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True, internal_low=0.3)
pipe.set_progress_bar_config(disable=True)
settings = dict(sampler="heun", num_inference_steps=6, guidance_scale=2.5, seed=11, output_type="latent")
found = {"plain": pipe([4, 0, 3], **settings).images}
found["guided"] = pipe([4, 0, 3], **settings, internal_guidance=1.6).images
save_file({key: tensor.contiguous() for key, tensor in found.items()}, out)
assert not any(name.partition(".")[0] == "st_fast" for name in sys.modules)
"""


def test_hugging_face_and_diffusers_folders_carry_the_head_and_draw_the_same(tmp_path):
    published(tmp_path / "ig.pt", encoder_depth=2)
    loaded = import_file(tmp_path / "ig.pt", number_of_heads=2)
    main([str(tmp_path / "ig.pt"), str(tmp_path / "hf"), "--to", "huggingface", "--heads", "2"])
    model = SiT.from_pretrained(tmp_path / "hf")
    assert model.config == loaded.config and read_model(tmp_path / "hf", print).loaded.config == loaded.config
    assert "A second final layer on block 2" in (tmp_path / "hf" / "README.md").read_text()
    main([str(tmp_path / "ig.pt"), str(tmp_path / "pipe"), "--to", "diffusers", "--heads", "2"])
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = warm.run("program.py", tmp_path / "pipe", "out.safetensors", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    draw = draw_of(read_labels("4,0,3", 5), 11, 0, 3, CPU)
    settings = Sample(sampler="heun", steps=6, cfg_scale=2.5)
    for name, scale in (("guided", 1.6), ("plain", 1.0)):
        mine = replace(settings, internal_guidance=scale, internal_range=(0.3, 1.0))
        ours = sample(model, draw, mine, "linear")
        assert (ours - theirs[name]).abs().max() <= 1e-4 * ours.abs().max()
    assert not torch.allclose(theirs["guided"], theirs["plain"], atol=1e-2)


def test_a_pipeline_of_a_model_without_the_head_says_so():
    from st_fast.convert.drawing import internal_scale

    pipe = argparse.Namespace(
        config=argparse.Namespace(internal_guidance=1.0),
        transformer=argparse.Namespace(config=argparse.Namespace(internal_head=0)),
    )
    assert internal_scale(pipe, None) == internal_scale(pipe, 1.0) == 1.0
    with pytest.raises(ValueError, match=r"internal_guidance = 1.4: this model has no internal head; 1 is possible"):
        internal_scale(pipe, 1.4)
