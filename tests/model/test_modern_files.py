"""LightningDiT's and SpeedrunDiT's files: the released networks' velocities, and back bit by bit."""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from st_fast import kernels
from st_fast.convert.__main__ import main as convert
from st_fast.convert.exporting import as_published, export_file
from st_fast.core.errors import UserError
from st_fast.model import SiT, build, stored
from st_fast.model.formats import LoadedState, import_file, layouts, modern
from st_fast.model.formats.loaded_state import heads, trunk
from st_fast.model.formats.modern import ANGLES
from st_fast.recipe import load
from st_fast.recipe.architecture import Model
from st_fast.recipe.load import to_literal
from st_fast.recipe.schema import Recipe
from st_fast.sample.__main__ import main as sample
from st_fast.train.start import check, taken_over
from tests.foreign import adamw_state
from tests.golden import released
from tests.model.test_formats import assert_same

GOLDEN = json.loads(released.FILE.read_text())
FULL = "lightningdit use_rope use_rmsnorm use_swiglu"
"""The published models' options."""
RUN = "speedrundit qk_norm"
TOLD = {case for case in released.CASES if "rope" in case or case.startswith("speed")}
"""Cases that their keys tell, all others need --from."""
CONFIG: dict[str, Any] = {
    "ckpt_path": None,
    "data": {"image_size": 96, "num_classes": released.CLASSES, "latent_norm": True, "latent_multiplier": 1.0},
    "model": {"model_type": "LightningDiT-XL/1", "use_rope": True, "in_chans": released.CHANNELS},
    "transport": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None},
    "sample": {"cfg_scale": 10.0, "stages": [1, [2, "x"]]},
}


def weights(case: str, moved: float = 0.0) -> dict[str, Tensor]:
    """A case's file's tensors, `moved` all but those that aren't trained."""
    fixed = ("pos_embed", *ANGLES)
    return {key: t if key in fixed else t + moved for key, t in released.state(GOLDEN[case]["shapes"]).items()}


def checkpoint(case: str, prefix: str = "") -> dict[str, Any]:
    """What the project's training saves after three updates, in DistributedDataParallel where `prefix` says so."""
    model, ema = weights(case), weights(case, 0.01)
    tables = {name: {prefix + key: t for key, t in table.items()} for name, table in (("model", model), ("ema", ema))}
    trained = {key: t for key, t in model.items() if key not in ANGLES}
    content: dict[str, Any] = {**tables, "opt": adamw_state(trained, 3)}
    if case.startswith("lightningdit"):
        return content | {"config": copy.deepcopy(CONFIG)}
    args = argparse.Namespace(model="SiT-B/1", num_classes=released.CLASSES, prediction="v", path_type="linear")
    return content | {"args": args, "steps": 400}


def saved(case: str, folder: Path, content: dict[str, Any] | None = None) -> Path:
    torch.save(content or weights(case), path := folder / "in.pt")
    return path


def read(case: str, path: Path, layout: str | None = None) -> LoadedState:
    return import_file(path, layout or case.split()[0], released.HEADS, released.CLASSES)


@pytest.mark.parametrize("case", released.CASES)
def test_a_released_network_and_ours_from_its_file_give_one_velocity(case, tmp_path):
    path = saved(case, tmp_path)
    told = import_file(path, None if case in TOLD else "lightningdit", released.HEADS, released.CLASSES)
    assert told.layout == case.split()[0]
    for kind in {"velocity", "path_drop"} & {*GOLDEN[case]}:
        theirs = torch.tensor(GOLDEN[case][kind])
        ours = released.velocity(told, kind == "path_drop").flatten()[:: released.EVERY]
        assert released.difference(ours, theirs) < 1e-5, kind
        assert theirs.std() > 0.3


@pytest.mark.parametrize("case", [case for case in released.CASES if case not in TOLD])
def test_a_lightningdit_without_a_key_of_its_own_is_known_by_its_config_alone(case, tmp_path):
    if case == "lightningdit use_qknorm":  # REPA's keys
        assert import_file(saved(case, tmp_path), None, None, released.CLASSES).layout == "repa"
    else:
        with pytest.raises(UserError, match="layout must be given"):
            import_file(saved(case, tmp_path), None, released.HEADS, released.CLASSES)
    found = import_file(saved(case, tmp_path, checkpoint(case)), None, released.HEADS)
    assert (found.layout, found.config.num_classes, found.path) == ("lightningdit", released.CLASSES, "linear")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("case", [FULL, "lightningdit use_qknorm", RUN])
def test_a_checkpoint_with_optimiser_and_settings_goes_out_bit_by_bit(case, prefix, tmp_path):
    content = checkpoint(case, prefix)
    loaded = read(case, saved(case, tmp_path, content))
    key = "blocks.1.attn.qkv.weight"
    number = [name for name in weights(case) if name not in ANGLES].index(key)
    assert torch.equal(loaded.exp_avg[key], content["opt"]["state"][number]["exp_avg"])
    assert (loaded.updates, loaded.step) == (3, content.get("steps", 3))
    export_file(loaded, loaded.layout, tmp_path / "out.pt", "ema")
    again = torch.load(tmp_path / "out.pt", weights_only=False)
    assert_same(again, content)
    assert [*again["model"]] == [*content["model"]]


@pytest.mark.parametrize("name", ["", "ema"])
def test_a_file_with_one_table_goes_out_as_it_came(name, tmp_path):
    for case in (FULL, RUN):
        content = {name: weights(case)} if name else weights(case)
        (folder := tmp_path / case.split()[0]).mkdir()
        loaded = read(case, saved(case, folder, content))
        export_file(loaded, loaded.layout, folder / "out.pt", "ema")
        again = torch.load(folder / "out.pt", weights_only=False)
        assert_same({key: again[key] for key in content}, content)


def test_what_speedrundit_has_besides_is_told_and_its_projector_is_a_head(tmp_path):
    loaded = read(RUN, saved(RUN, tmp_path, checkpoint(RUN)))
    assert len(loaded.remarks) == 1 and "class token (REG) is left out" in loaded.remarks[0]
    assert {key.split(".")[0] for key in heads(loaded.model)} == {"projectors"}
    config = loaded.config
    assert (config.norm, config.position, config.qk_norm, config.value_residual) == ("rms", "both", "rms", True)
    assert (config.fusion_first, config.fusion_last, config.heads) == (2, 4, released.HEADS)


def test_heads_follow_from_the_angles_or_the_size_and_the_ratio_from_the_width(tmp_path):
    assert import_file(saved(FULL, tmp_path), None, None, 7).config.heads == released.HEADS
    bare = saved("lightningdit use_swiglu", tmp_path)
    with pytest.raises(UserError, match="no published size"):
        import_file(bare, "lightningdit", None, 7)
    ours = Model(depth=24, width=1536, heads=24, patch=2, channels=4, latent_size=4, num_classes=5, mlp="swiglu",
                 norm="rms_affine", qk_norm=False)  # fmt: skip
    with torch.device("meta"):
        table = SiT(ours, kernels.select({}, torch.device("cpu"))).state_dict()
    count = modern.head_count(table, "lightningdit")
    found = layouts.infer(table, {"num_classes": 5}, count, "file")
    assert (found.heads, found.mlp_ratio, found.hidden) == (24, 4.0, 4096)


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads"),
    [("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16), ("1p0B", 24, 1536, 24), ("1p6B", 28, 1792, 28)],
)
def test_its_sizes_are_known_by_depth_and_width_and_named_in_its_config(name, depth, width, heads):
    table = {f"blocks.{number}.attn.qkv.weight": torch.empty(0) for number in range(depth)}
    table["x_embedder.proj.weight"] = torch.empty(width, 32, 1, 1, device="meta")
    assert modern.head_count(table, "lightningdit") == heads and modern.head_count(table, "speedrundit") is None
    config = Model(depth=depth, width=width, heads=heads, patch=1, channels=32, num_classes=9)
    said = modern.own_config(config, "cosine")
    assert (said["model"]["model_type"], said["transport"]["path_type"]) == (f"LightningDiT-{name}/1", "GVP")
    other = modern.own_config(replace(config, heads=2 * heads), "linear")
    assert other["model"]["model_type"] == "LightningDiT-custom/1"


@pytest.fixture
def lightning(tmp_path) -> Path:
    return saved(FULL, tmp_path, checkpoint(FULL))


def test_a_stage_of_ours_and_a_model_folder_keep_the_options(lightning, tmp_path, capsys):
    convert([str(lightning), str(tmp_path / "stage")])
    convert([str(lightning), str(tmp_path / "hf"), "--to", "huggingface"])
    said = capsys.readouterr().out
    assert "mlp swiglu, norm rms_affine, position both" in said and "--model.mlp=swiglu" in said
    theirs = released.velocity(read(FULL, lightning))
    for folder in ("stage", "hf"):
        assert torch.equal(released.velocity(stored.read_model(tmp_path / folder, print).loaded), theirs)


@pytest.mark.parametrize("case", [FULL, "lightningdit use_rmsnorm use_qknorm use_swiglu", "lightningdit"])
def test_a_model_of_ours_goes_out_as_a_lightningdit(case, tmp_path):
    config = read(case, saved(case, tmp_path)).config
    generator = torch.Generator().manual_seed(3)
    network = build(config, kernels.select({}, torch.device("cpu")), 0)
    table = {key: t if key == "pos_embed" else t + 0.1 * torch.randn(t.shape, generator=generator)
             for key, t in network.state_dict().items()}  # fmt: skip
    own = LoadedState(config=config, layout="repa", model=table, ema=table, path="cosine")
    export_file(own, "lightningdit", tmp_path / "out.pt", "ema")
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {key: list(t.shape) for key, t in content["ema"].items()} == GOLDEN[case]["shapes"]
    assert [content["config"]["model"][flag] for flag in released.FLAGS] == [flag in case for flag in released.FLAGS]
    assert (content["config"]["model"]["wo_shift"], content["config"]["model"]["in_chans"]) == (False, 5)
    for key in {*ANGLES, "pos_embed"} & {*content["ema"]}:
        torch.testing.assert_close(content["ema"][key], weights(case)[key])
    assert content["config"]["data"] == {"num_classes": released.CLASSES}
    again = import_file(tmp_path / "out.pt", None, released.HEADS)  # its own config tells the rest, in any size
    assert (again.layout, again.path, again.config) == ("lightningdit", "cosine", config)
    torch.testing.assert_close(released.velocity(again), released.velocity(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "options", "said"),
    [
        ("sit", {"norm": "rms"}, 'model.norm = "rms": sit\'s own code has "layer" only'),
        ("repa", {"position": "rope"}, 'model.position = "rope": repa\'s own code has "sincos" only'),
        ("sra", {"registers": 3}, "model.registers = 3: sra's own code has 0 only"),
        ("self-transcendence", {"mlp": "swiglu"}, 'model.mlp = "swiglu": self-transcendence\'s own code has "gelu"'),
        ("repa", {"qk_norm": "rms"}, 'model.qk_norm = "rms": repa\'s own code has false or true only'),
        ("lightningdit", {"norm": "rms"}, 'has "layer" or "rms_affine" only'),
        ("lightningdit", {"norm": "rms_affine", "qk_norm": True}, 'code has false or "rms" only'),
        ("lightningdit", {"qk_norm": "rms"}, 'qk_norm = "rms": lightningdit\'s own code has false or true only'),
        ("lightningdit", {"qkv_bias": False}, "model.qkv_bias = false"),
        ("lightningdit", {"fusion_first": 2, "fusion_last": 4}, "no fusion of blocks"),
        ("speedrundit", {}, "needs a class token"),
    ],
)  # fmt: skip
def test_an_option_that_the_other_code_has_not_is_refused_in_one_line(layout, options, said):
    config = Model(**{"depth": 6, "width": 48, "heads": 4, "patch": 2, "qk_norm": False} | options)
    with pytest.raises(UserError) as refused:
        as_published(LoadedState(config=config, layout="repa", model={}, ema={}), layout)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def fewer(key: str) -> Any:
    return lambda state: state.pop(key)


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        (FULL, lambda s: s.update({"blocks.0.adaLN_modulation.1.bias": torch.zeros(192)}), "wo_shift"),
        (FULL, lambda s: s.update({ANGLES[0]: s[ANGLES[0]] * 0.98}), "3 × 3 grid at base 10000"),
        (FULL, lambda s: s.update({ANGLES[1]: s[ANGLES[1]][:4]}), ANGLES[1]),
        (FULL, fewer(ANGLES[1]), ANGLES[1]),
        (FULL, fewer("blocks.1.norm2.weight"), "blocks.1.norm2.weight"),
        (FULL, fewer("final_layer.norm_final.weight"), "final_layer.norm_final.weight"),
        (FULL, lambda s: s.update(extra=torch.zeros(3)), "extra"),
        (FULL, fewer("x_embedder.proj.weight"), "x_embedder.proj.weight is missing"),
        (FULL, lambda s: s.update({"x_embedder.proj.weight": torch.zeros(())}), "x_embedder.proj.weight has shape ()"),
        (FULL, lambda s: s.update({ANGLES[0]: torch.zeros(9, 0)}), ANGLES[0]),
        (RUN, fewer("wg_norm.weight"), "wg_norm.weight"),
        (RUN, fewer("final_layer.linear_cls.weight"), "final_layer.linear_cls.weight"),
        (RUN, fewer(ANGLES[0]), ANGLES[0]),
        (RUN, fewer("pos_embed"), "pos_embed is missing"),
        (RUN, fewer("blocks.3.attn.v1_lambda"), "blocks.3.attn.v1_lambda"),
        (RUN, lambda s: s.update({"cls_projectors2.bias": torch.zeros(5)}), "cls_projectors2.bias"),
        (RUN, lambda s: s.update({"blocks.3.attn.v1_lambda": torch.zeros(1)}), "blocks.3.attn.v1_lambda"),
        (RUN, fewer("projectors.0.4.bias"), "projectors.0.4"),
        (RUN, fewer("mask_token"), "mask_token"),
    ],
)
def test_a_file_that_is_not_quite_it_is_refused_in_one_line(case, change, said, tmp_path):
    state = weights(case)
    change(state)
    with pytest.raises(UserError) as refused:
        import_file(saved(case, tmp_path, state), None, released.HEADS, released.CLASSES)
    assert said in str(refused.value) and str(tmp_path / "in.pt") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_config_that_is_no_table_of_plain_values_is_not_kept(tmp_path):
    deep: dict[str, Any] = {}
    deep["again"], many = deep, ["x"]
    for _ in range(60):
        many = [many, many]
    for config in (deep, {"many": many}, {"model": {"model_type": torch.zeros(2)}}, [torch.zeros(1)]):
        (folder := tmp_path / str(id(config))).mkdir()
        loaded = read(FULL, saved(FULL, folder, {"ema": weights(FULL), "config": config}))
        assert "config" not in as_published(loaded, "lightningdit")


def test_it_is_a_teacher_and_a_start(lightning, tmp_path):
    loaded, table = read(FULL, lightning), kernels.select({}, torch.device("cpu"))
    cpu = torch.device("cpu")
    teacher = stored.load_frozen(lightning, loaded.config, "ema", table, cpu, torch.float32)
    assert all(torch.equal(t, loaded.ema[key]) for key, t in teacher.state_dict().items())
    with pytest.raises(UserError, match=r"another architecture: .*norm rms_affine"):
        stored.load_frozen(lightning, replace(loaded.config, norm="layer"), "ema", table, cpu, torch.float32)
    told = {"norm": "rms_affine", "position": "both", "mlp": "swiglu", "qk_norm": False}
    check(recipe := starting(tmp_path, lightning, told), recipe.stages[0], (), print)
    check(recipe := starting(tmp_path, lightning, told | {"qk_norm": "off"}), recipe.stages[0], (), print)
    for key, value in (("position", "sincos"), ("mlp", "gelu"), ("norm", "layer")):
        recipe = starting(tmp_path, lightning, told | {key: value})
        with pytest.raises(UserError, match=f"another architecture: .*{key} {told[key]}"):
            check(recipe, recipe.stages[0], (), print)


def starting(folder: Path, file: Path, options: dict[str, Any], depth: int = 2, stage: str = "") -> Recipe:
    """A recipe for a network of the cases' sizes, whose one stage starts from a file."""
    sizes = {
        "depth": depth, "width": released.WIDTH, "heads": released.HEADS, "patch": released.PATCH, "mlp_ratio": 3.3,
        "channels": released.CHANNELS, "latent_size": released.SIDE, "num_classes": released.CLASSES,
    }  # fmt: skip
    keys = "".join(f"{key} = {to_literal(value)}\n" for key, value in (sizes | options).items())
    text = f'[data]\npath = "x"\n[run]\nout = "{folder}/out"\n[model]\n{keys}[[stage]]\nname = "one"\n'
    (folder / "r.toml").write_text(f'{text}supervision = "none"\nsteps = 1\ninit = "{file}"\n{stage}')
    return load(folder / "r.toml")


def test_a_start_from_a_speedrundit_takes_its_weights_and_tells_what_is_left_out(tmp_path):
    file, lines = saved(RUN, tmp_path, checkpoint(RUN)), list[str]()
    options = {"norm": "rms", "position": "both", "qk_norm": "rms", "value_residual": True}
    recipe = starting(
        tmp_path, file, options, 6, 'route = "sprint"\nroute_first = 2\nroute_last = 4\nroute_select = "random"\n'
    )
    config = recipe.for_stage(recipe.stages[0]).model
    drawn = dict(build(config, kernels.select({}, torch.device("cpu")), 0).state_dict())
    state, said = taken_over(recipe, recipe.stages[0], {"model": drawn, "ema": drawn}, lines.append)
    expected = read(RUN, file).ema
    assert all(torch.equal(t, expected[key]) for key, t in state["model"].items()) and said.layout == "speedrundit"
    assert len(lines) == 1 and lines[0].startswith(f"{file}: its class token (REG) is left out")


def test_it_is_sampled_from_and_a_class_token_that_is_left_out_is_told(lightning, tmp_path, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    from tests.sample.test_published import write_vae

    monkeypatch.chdir(tmp_path)
    vae, told = write_vae(tmp_path / "vae", released.CHANNELS), ["--num-classes", str(released.CLASSES)]
    asked = ["-n", "2", "--steps", "2", "--sampler", "euler", "--cfg-scale", "1", "--vae", str(vae), *told]
    sample([str(lightning), *asked])
    assert "class token" not in capsys.readouterr().out
    torch.save(weights(RUN), tmp_path / "run.pt")
    sample([str(tmp_path / "run.pt"), *asked])
    assert "its class token (REG) is left out" in capsys.readouterr().out
    assert len([*(tmp_path / "samples").iterdir()]) == 2


def test_a_folder_with_rope_alone_and_registers_is_read_back(tmp_path):
    config = Model(
        depth=2, width=48, heads=4, patch=2, latent_size=(8, 12), num_classes=5, position="rope", registers=3
    )
    network = build(config, kernels.select({}, torch.device("cpu")), 1)
    network.save_pretrained(tmp_path / "hf")
    found = stored.read_model(tmp_path / "hf", print).loaded
    assert found.config == config
    assert trunk(found.model).keys() == network.state_dict().keys() and "register_tokens" in trunk(found.model)


def test_a_network_of_ours_with_a_value_residual_is_not_taken_for_a_speedrundit():
    config = Model(depth=2, width=16, heads=2, patch=2, channels=3, latent_size=4, num_classes=3, value_residual=True)
    table = build(config, kernels.select({}, torch.device("cpu")), 0).state_dict()
    assert layouts.detect(table, {"prediction": "v"}, "ours") == "repa"
    theirs = table | {"blocks.1.attn.v1_lambda": table["blocks.1.attn.v1_lambda"][0]}
    assert layouts.detect(theirs, {"prediction": "v"}, "theirs") == "speedrundit"
