"""Foreign checkpoints come in strictly and go out as they came; official SiT gives the same velocity field."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from st_fast import kernels
from st_fast.convert.exporting import export_file
from st_fast.core.errors import UserError
from st_fast.model import SiT, network
from st_fast.model.formats import LoadedState, import_file
from st_fast.model.formats.layouts import infer, published_order
from st_fast.recipe.schema import Model

DEPTH, WIDTH, HEADS, PATCH, CHANNELS, SIDE, CLASSES, TEXT_WIDTH = 2, 16, 2, 2, 3, 3, 5, 12
Shapes = OrderedDict[str, tuple[int, ...]]


def linear(shapes: Shapes, name: str, rows: int, columns: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)


def foreign_shapes(layout: str, qk_norm: bool = False, sigma: bool = False) -> Shapes:
    """Keys and shapes in the order in which the published modules register their parameters."""
    if layout.startswith("mmdit "):
        return mmdit_shapes(layout.removeprefix("mmdit "), qk_norm)
    s: Shapes = OrderedDict()
    s["pos_embed"] = (1, SIDE**2, WIDTH)
    s["x_embedder.proj.weight"], s["x_embedder.proj.bias"] = (WIDTH, CHANNELS, PATCH, PATCH), (WIDTH,)
    linear(s, "t_embedder.mlp.0", WIDTH, 256)
    linear(s, "t_embedder.mlp.2", WIDTH, WIDTH)
    s["y_embedder.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    for i in range(DEPTH):
        linear(s, f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH)
        for norm in ("q_norm", "k_norm") if qk_norm else ():
            s[f"blocks.{i}.attn.{norm}.weight"] = s[f"blocks.{i}.attn.{norm}.bias"] = (WIDTH // HEADS,)
        linear(s, f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        linear(s, f"blocks.{i}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(s, f"blocks.{i}.mlp.fc2", WIDTH, 4 * WIDTH)
        linear(s, f"blocks.{i}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    for j in range(2) if layout == "repa" else ():
        for k, (rows, columns) in zip((0, 2, 4), ((24, WIDTH), (24, 24), (10 + j, 24)), strict=True):
            linear(s, f"projectors.{j}.{k}", rows, columns)
    for j in range(2) if layout == "repa-1" else ():  # iREPA's convolution
        s[f"projectors.{j}.projection_layer.weight"] = (10 + j, WIDTH, 3, 3)
        s[f"projectors.{j}.projection_layer.bias"] = (10 + j,)
    if layout == "repa-2":  # the MLP of iREPA's code
        for k, (rows, columns) in zip((0, 2, 4), ((24, WIDTH), (24, 24), (10, 24)), strict=True):
            linear(s, f"projectors.0.projection_layer.{k}", rows, columns)
    if layout.startswith("self-transcendence"):
        for k, (rows, columns) in zip((0, 2, 4), ((24, WIDTH), (24, 24), (WIDTH, 24)), strict=True):
            linear(s, f"projectors.{k}", rows, columns)
    if layout == "self-transcendence-1":
        linear(s, "projectors_final.linear", PATCH**2 * CHANNELS, WIDTH)
    if layout == "sra":
        linear(s, "ap_head.linear1", 2 * WIDTH, WIDTH)
        linear(s, "ap_head.linear2", WIDTH, 2 * WIDTH)
    linear(s, "final_layer.linear", PATCH**2 * CHANNELS * (2 if sigma else 1), WIDTH)
    linear(s, "final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return s


def mmdit_shapes(layout: str, qk_norm: bool) -> Shapes:
    """The same of REPA's MMDiT, and of Self-Transcendence's: positions are a buffer, heads come last."""
    s: Shapes = OrderedDict()
    s["pos_embed"] = (1, SIDE**2, WIDTH)
    s["x_embedder.proj.weight"], s["x_embedder.proj.bias"] = (WIDTH, CHANNELS, PATCH, PATCH), (WIDTH,)
    linear(s, "t_embedder.mlp.0", WIDTH, 256)
    linear(s, "t_embedder.mlp.2", WIDTH, WIDTH)
    linear(s, "context_embedder", WIDTH, TEXT_WIDTH)
    for i in range(DEPTH):
        for stream in ("context_block", "x_block"):
            block, whole = f"joint_blocks.{i}.{stream}", stream == "x_block" or i < DEPTH - 1
            linear(s, f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
            if whole:
                linear(s, f"{block}.attn.proj", WIDTH, WIDTH)
            for norm in ("ln_q", "ln_k") if qk_norm else ():
                s[f"{block}.attn.{norm}.weight"] = s[f"{block}.attn.{norm}.bias"] = (WIDTH // HEADS,)
            if whole:
                linear(s, f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
                linear(s, f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
            linear(s, f"{block}.adaLN_modulation.1", (6 if whole else 2) * WIDTH, WIDTH)
    linear(s, "final_layer.linear", PATCH**2 * CHANNELS, WIDTH)
    linear(s, "final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    name = "projectors.0" if layout == "repa" else "projectors"
    for k, (rows, columns) in zip((0, 2, 4), ((24, WIDTH), (24, 24), (WIDTH, 24)), strict=True):
        linear(s, f"{name}.{k}", rows, columns)
    if layout == "self-transcendence-1":
        linear(s, "projectors_final.linear", PATCH**2 * CHANNELS, WIDTH)
        linear(s, "projectors_final.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return s


def drawn(shapes: Shapes, seed: int) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict((key, torch.randn(shape, generator=generator) * 0.2) for key, shape in shapes.items())


def trained(weights: OrderedDict[str, Tensor]) -> dict:
    """The state of torch's own AdamW after two updates of every parameter but the positions, which may be a buffer."""
    weights = {k: t for k, t in weights.items() if k != "pos_embed" or "context_embedder.bias" not in weights}
    parameters = [torch.nn.Parameter(t.clone(), requires_grad=key != "pos_embed") for key, t in weights.items()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(9)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        optimizer.step()
    return optimizer.state_dict()


CASES: dict[str, dict] = {
    "sit": dict(layout="sit", sigma=True),
    "repa": dict(layout="repa"),
    "irepa": dict(layout="repa-1"),
    "irepa, its MLP": dict(layout="repa-2"),
    "stage 1": dict(layout="self-transcendence-1", qk_norm=True),
    "stage 2": dict(layout="self-transcendence-2", qk_norm=True),
    "sra": dict(layout="sra"),
    "text, repa": dict(layout="mmdit repa"),
    "text, stage 1": dict(layout="mmdit self-transcendence-1"),
    "text, stage 2": dict(layout="mmdit self-transcendence-2", qk_norm=True),
}


def checkpoint(case: str) -> dict:
    weights = drawn(foreign_shapes(**CASES[case]), 1)
    args = argparse.Namespace(model="tiny", num_classes=CLASSES, prediction="velocity" if case == "sit" else "v")
    content = {"model": weights, "ema": drawn(foreign_shapes(**CASES[case]), 2), "opt": trained(weights), "args": args}
    return content if case == "sit" else content | {"steps": 2}


def assert_same(a: object, b: object) -> None:
    """Equal through dicts, lists and Namespaces, tensors bit by bit, dict keys in the same order."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict) and list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


def read(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_with_optimiser_and_args_round_trips_bit_exactly(case, tmp_path):
    content = checkpoint(case)
    torch.save(content, tmp_path / "in.pt")
    bundle = import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    assert bundle.layout == str(CASES[case]["layout"]).removeprefix("mmdit ").removesuffix("-1").removesuffix("-2")
    export_file(bundle, bundle.layout, tmp_path / "out.pt", "ema")
    again = read(tmp_path / "out.pt")
    assert set(again) == set(content)
    for key, value in content.items():
        assert_same(dict(value) if key in ("model", "ema") else value, again[key])


def test_a_prefixed_bare_state_dict_round_trips_bit_exactly(tmp_path):
    weights = {f"module._orig_mod.{k}": t for k, t in drawn(foreign_shapes("repa"), 1).items()}
    torch.save(weights, tmp_path / "in.pt")
    export_file(
        import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES), "repa", tmp_path / "out.pt", "ema"
    )
    assert_same(weights, read(tmp_path / "out.pt"))


def in_blocks(name: str) -> Callable[[str], str]:
    """Puts a wrapper's name before every block's parts."""
    return lambda key: re.sub(r"^(blocks\.\d+\.)", rf"\1{name}.", key)


WRAPPED: dict[str, Callable[[str], str]] = {
    "DistributedDataParallel": lambda key: f"module.{key}",
    "a compiled model": lambda key: f"_orig_mod.{key}",
    "compiled blocks": in_blocks("_orig_mod"),
    "compiled blocks of ranks": lambda key: f"module.{in_blocks('_orig_mod')(key)}",
    "checkpointed blocks": in_blocks("_checkpoint_wrapped_module"),
    "shards": lambda key: f"_fsdp_wrapped_module.{in_blocks('_fsdp_wrapped_module')(key)}",
    "Lightning": lambda key: f"model.{key}",
    "Lightning, compiled": lambda key: f"model._orig_mod.{key}",
    "Lightning, compiled blocks": lambda key: f"net.{in_blocks('_orig_mod')(key)}",
    "some of each": lambda key: in_blocks("_orig_mod")(key) if "blocks.1" in key else f"module.{key}",
}
NOT_WRITTEN_BACK = {name for name in WRAPPED if "block" in name or name in ("shards", "some of each")}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wrappers_put_into_keys_is_taken_out(wrapper, tmp_path):
    weights = drawn(foreign_shapes("repa"), 1)
    wrapped = {WRAPPED[wrapper](key): tensor for key, tensor in weights.items()}
    assert wrapped.keys() != weights.keys()
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    assert_same(dict(found.model), dict(weights))
    export_file(found, "repa", tmp_path / "out.pt", "ema")
    told = wrapper in NOT_WRITTEN_BACK
    assert found.facts["unprefixed"] == (["state_dict"] if told else []) and not found.remarks
    assert_same(dict(weights) if told else wrapped, read(tmp_path / "out.pt")["state_dict"])


def test_a_key_that_is_there_with_and_without_a_wrapper_is_refused(tmp_path):
    weights = drawn(foreign_shapes("repa"), 1)
    for other in ("module.pos_embed", "model.pos_embed", "_orig_mod.module.pos_embed"):
        torch.save(weights | {other: weights["pos_embed"]}, tmp_path / "in.pt")
        with pytest.raises(UserError, match="'pos_embed' occurs twice, with and without a prefix"):
            import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    torch.save(weights | {"blocks.1._orig_mod.mlp.fc1.bias": weights["blocks.1.mlp.fc1.bias"]}, tmp_path / "in.pt")
    with pytest.raises(UserError, match=r"'blocks.1.mlp.fc1.bias' occurs twice"):
        import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)


@pytest.mark.parametrize("averaged", ["ema", "ema_model", "net_ema._orig_mod", "module.ema.module"])
def test_a_model_and_its_average_in_one_table_are_two(averaged, tmp_path):
    weights, average = drawn(foreign_shapes("repa"), 1), drawn(foreign_shapes("repa"), 2)
    both = {f"model.{k}": t for k, t in weights.items()} | {f"{averaged}.{k}": t for k, t in average.items()}
    torch.save({"state_dict": both}, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    assert_same(dict(found.model), dict(weights))
    assert_same(dict(found.ema), dict(average))
    export_file(found, "repa", tmp_path / "out.pt", "ema")
    again = read(tmp_path / "out.pt")
    assert_same(dict(average), again["ema"])
    assert_same(dict(weights), again["model"])
    torch.save({"state_dict": both, "ema": average}, tmp_path / "in.pt")
    with pytest.raises(UserError, match="holds a model and its average, and beside it the file has ema, state_dict"):
        import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


OTHERS: dict[str, tuple[Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], str]] = {
    "SGD": (sgd, r"another optimiser's: of 'x_embedder.proj.weight' it keeps \['momentum_buffer'\], AdamW exp_avg and"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), r"another optimiser's: .* \['step', 'square_avg'\], AdamW"),
    "two groups": (lambda p: torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:]}]), "2 parameter groups"),
    "fewer parameters": (lambda p: torch.optim.AdamW(p[1:]), "opt has 43 parameters, the model 44"),
    "no step": (torch.optim.AdamW, "opt is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimisers_state_is_left_out_and_told(name, tmp_path):
    make, expected = OTHERS[name]
    content = checkpoint("repa")
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in content["model"].values()]
    optimizer = make(parameters)
    for p in parameters if name != "no step" else ():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(content | {"opt": optimizer.state_dict()}, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    assert re.search(expected, found.left_out), found.left_out
    assert not found.exp_avg and found.step == 2
    assert_same(dict(found.ema), dict(content["ema"]))
    export_file(found, "repa", tmp_path / "out.pt", "ema")
    assert set(read(tmp_path / "out.pt")) == {"model", "ema", "args", "steps"}
    for odd in ([1], "text", 3, torch.zeros(2)):
        torch.save(content | {"opt": odd}, tmp_path / "in.pt")
        found = import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
        assert found.left_out == f"opt is {type(odd).__name__}, no optimiser's state"
    for empty in ({}, None, []):
        torch.save(content | {"opt": empty}, tmp_path / "in.pt")
        found = import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
        assert found.left_out == "opt is empty" and not found.exp_avg


def test_a_state_under_another_name_is_told(tmp_path):
    content = checkpoint("repa")
    content["optimizer_states"] = [content.pop("opt")]
    torch.save(content, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    assert found.left_out == "optimizer_states is not read, only opt" and not found.exp_avg


def test_our_own_keys_go_out_in_the_order_that_numbers_an_optimisers_state():
    config = Model(depth=DEPTH, width=WIDTH, heads=HEADS, patch=PATCH, channels=CHANNELS, latent_size=SIDE * PATCH,
                   num_classes=CLASSES)  # fmt: skip
    ours = SiT(config, kernels.select({}, torch.device("cpu"))).state_dict()
    shapes = foreign_shapes("self-transcendence-1", qk_norm=True)
    ours |= {key: torch.zeros(1) for key in shapes if key.startswith("projectors")}
    assert list(ours) != list(shapes) and published_order(ours) == list(shapes)


def test_safetensors_are_read_too(tmp_path):
    weights = drawn(foreign_shapes("sra"), 1)
    save_file(dict(weights), tmp_path / "in.safetensors")
    bundle = import_file(tmp_path / "in.safetensors", number_of_heads=HEADS, num_classes=CLASSES)
    assert bundle.layout == "sra" and all(torch.equal(bundle.model[k], t) for k, t in weights.items())


def official_velocity(w: dict[str, Tensor], x: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Official SiT's forward pass written out in float64 from its convention: s = 1 is data."""
    w = {key: t.double() for key, t in w.items()}

    def apply(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    frequency = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = s.double()[:, None] * frequency
    t = apply("t_embedder.mlp.2", F.silu(apply("t_embedder.mlp.0", torch.cat((angle.cos(), angle.sin()), 1))))
    c = F.silu(t + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    for i in range(DEPTH):
        m = apply(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = apply(f"blocks.{i}.attn.qkv", modulated(h, m[0], m[1]))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        h = h + m[2][:, None] * apply(f"blocks.{i}.attn.proj", a.transpose(1, 2).flatten(2))
        hidden = F.gelu(apply(f"blocks.{i}.mlp.fc1", modulated(h, m[3], m[4])), approximate="tanh")
        h = h + m[5][:, None] * apply(f"blocks.{i}.mlp.fc2", hidden)
    out = apply("final_layer.linear", modulated(h, *apply("final_layer.adaLN_modulation.1", c).chunk(2, 1)))
    image = torch.empty(len(x), out.shape[-1] // PATCH**2, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
    for token in range(SIDE**2):
        for place in range(PATCH**2):
            row, column = token // SIDE * PATCH + place // PATCH, token % SIDE * PATCH + place % PATCH
            image[:, :, row, column] = out[:, token].unflatten(-1, (PATCH**2, -1))[:, place]
    return image[:, :CHANNELS]


@pytest.mark.parametrize("sigma", [True, False])
def test_an_official_model_gives_the_same_velocity_field(sigma, tmp_path):
    weights = drawn(foreign_shapes("sit", sigma=sigma), 4)
    torch.save(weights, tmp_path / "in.pt")
    bundle = import_file(tmp_path / "in.pt", layout="sit", number_of_heads=HEADS, num_classes=CLASSES)
    model = SiT(bundle.config, kernels.select({}, torch.device("cpu"))).eval()
    model.load_state_dict(dict(bundle.model))
    x, t = torch.randn(6, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(5)), torch.linspace(0, 1, 6)
    y = torch.arange(6)
    with torch.no_grad():
        ours = model(x, t, y)[0]
    theirs = -official_velocity(weights, x, 1 - t, y)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def test_a_trained_model_goes_out_in_the_official_convention(tmp_path):
    weights = drawn(foreign_shapes("repa"), 6)
    torch.save(weights, tmp_path / "in.pt")
    export_file(
        import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES), "sit", tmp_path / "sit.pt", "ema"
    )
    again = import_file(tmp_path / "sit.pt", number_of_heads=HEADS, num_classes=CLASSES)
    assert again.layout == "sit" and set(read(tmp_path / "sit.pt")) == {"model", "ema", "args"}
    trunk = {k: t for k, t in weights.items() if not k.startswith("projectors")}
    assert set(again.model) == set(trunk)
    assert all(torch.allclose(again.model[k], t, atol=1e-6) for k, t in trunk.items())


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("callee", ["os.system", "subprocess"])
def test_a_hostile_pickle_is_refused_in_one_line_and_not_executed(callee, tmp_path):
    hostile = Hostile(tmp_path / "owned")
    if callee == "subprocess":
        hostile.__class__ = type("H", (), {"__reduce__": lambda self: (subprocess.call, (["touch", self.target],))})
    torch.save({"model": drawn(foreign_shapes("repa"), 1), "args": hostile}, tmp_path / "in.pt")
    with pytest.raises(UserError, match="refused, nothing executed") as caught:
        import_file(tmp_path / "in.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "owned").exists()


def spoilt(tmp_path: Path, change) -> str:
    weights = drawn(foreign_shapes("repa"), 1)
    change(weights)
    torch.save(weights, tmp_path / "in.pt")
    with pytest.raises(UserError) as caught:
        import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_missing_and_extra_key_is_listed(tmp_path):
    def change(w):
        for key in [k for k in w if k.startswith("blocks.1.") and "fc1" not in k]:
            del w[key]
        w |= {f"stranger.{n}": torch.zeros(1) for n in range(20)}

    message = spoilt(tmp_path, change)
    gone = [k for k in foreign_shapes("repa") if k.startswith("blocks.1.") and "fc1" not in k]
    assert all(f"'{k}'" in message for k in [*gone, *(f"stranger.{n}" for n in range(20))])


def test_a_wrong_size_dtype_or_value_is_named(tmp_path):
    key = "blocks.1.mlp.fc2.bias"
    assert key in spoilt(tmp_path, lambda w: w.update({key: torch.zeros(7)}))
    assert "float64" in spoilt(tmp_path, lambda w: w.update({key: w[key].double()}))
    assert "NaN" in spoilt(tmp_path, lambda w: w[key].fill_(float("nan")))
    for single in ("projectors.0.0.bias", "projectors.0.4.bias", "final_layer.linear.bias"):
        assert single in spoilt(tmp_path, lambda w, key=single: w.update({key: torch.zeros(())}))
    assert "9 sizes" not in spoilt(tmp_path, lambda w: w.update({"pos_embed": torch.zeros(1, 8, WIDTH)}))


def test_what_nothing_decides_must_be_said(tmp_path):
    torch.save(drawn(foreign_shapes("none"), 1), tmp_path / "in.pt")
    with pytest.raises(UserError, match="layout must be given, as sit or repa"):
        import_file(tmp_path / "in.pt", number_of_heads=HEADS, num_classes=CLASSES)
    with pytest.raises(UserError, match="number_of_heads must be given"):
        import_file(tmp_path / "in.pt", layout="repa", num_classes=CLASSES)
    assert isinstance(
        import_file(tmp_path / "in.pt", layout="repa", number_of_heads=HEADS, num_classes=CLASSES), LoadedState
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_table_of_an_mmdit_alone_tells_the_network(qk_norm, tmp_path):
    weights = {k: t for k, t in drawn(mmdit_shapes("repa", qk_norm), 1).items() if not k.startswith("projectors")}
    save_file(weights, tmp_path / "in.safetensors")
    found = import_file(tmp_path / "in.safetensors", number_of_heads=None if qk_norm else HEADS)
    config = Model(
        depth=DEPTH, width=WIDTH, heads=HEADS, patch=PATCH, channels=CHANNELS, latent_size=SIDE * PATCH,
        network="mmdit", text_width=TEXT_WIDTH, text_length=77, qk_norm=qk_norm,
    )  # fmt: skip
    assert (found.config, found.layout) == (config, "repa")
    with pytest.raises(UserError, match="an MMDiT, which is no network of sit"):
        export_file(found, "sit", tmp_path / "out.pt", "ema")
    with pytest.raises(UserError, match="an MMDiT, which is no network of sra"):
        import_file(tmp_path / "in.safetensors", "sra", HEADS)
    with torch.device("meta"):
        coco = replace(config, depth=24, width=768, heads=12 if qk_norm else 24)
        published = {k: t for k, t in network(coco, kernels.select({}, torch.device("cpu"))).state_dict().items()
                     if k != "null_context"}  # fmt: skip
    assert infer(published, {}, None, "here").name == ("custom" if qk_norm else "MMDiT-24/2")


def test_a_dit_and_an_unknown_file_are_refused(tmp_path):
    content = {"model": drawn(foreign_shapes("sit", sigma=True), 1), "args": argparse.Namespace(model="DiT-XL/2")}
    torch.save(content, tmp_path / "dit.pt")
    with pytest.raises(UserError, match="predicts noise"):
        import_file(tmp_path / "dit.pt", number_of_heads=HEADS, num_classes=CLASSES)
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="unknown layout"):
        import_file(tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UserError, match="refused"):
        import_file(tmp_path / "junk.pt")
