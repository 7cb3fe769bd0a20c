"""The internal head: a second final layer on a shallow block, whose presence changes nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from st_fast import kernels
from st_fast.model import build
from st_fast.model.transformer import INTERNAL
from st_fast.recipe.architecture import Model, check_shapes, resolve_model
from st_fast.recipe.error import RecipeError

SIT = Model(depth=3, width=16, heads=2, patch=2, channels=3, latent_size=(4, 6), num_classes=5, zero_init=False)
MMDIT = replace(SIT, network="mmdit", text_width=12, text_length=5)


def made(config, internal_head=0):
    config = resolve_model(replace(config, internal_head=internal_head))
    return build(config, kernels.select({}, torch.device("cpu")), 7)


def inputs(config):
    draw = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, *config.latent_shape, generator=draw), torch.tensor([0.31, 0.83])
    text = torch.randn(2, config.text_length, config.text_width, generator=draw)
    return x, t, torch.tensor([1, 3]) if config.network == "sit" else text


@pytest.mark.parametrize("modulation", ["per_block", "one"])
@pytest.mark.parametrize("config", [SIT, MMDIT], ids=["sit", "mmdit"])
def test_the_head_changes_neither_the_other_weights_nor_the_output_nor_any_stream(config, modulation):
    config = replace(config, modulation=modulation)
    plain, headed = made(config), made(config, 2)
    own = headed.state_dict()
    assert {key for key in own if key not in plain.state_dict()} == {
        f"final_layer_xr.{layer}.{kind}" for layer in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")
    }
    assert all(torch.equal(tensor, own[key]) for key, tensor in plain.state_dict().items())
    velocity, streams = plain(*inputs(config), tap=(2, 3))
    with_head, (internal, *others) = headed(*inputs(config), tap=(INTERNAL, 2, 3))
    assert torch.equal(velocity, with_head) and all(map(torch.equal, streams, others))
    assert internal.shape == velocity.shape


@pytest.mark.parametrize("modulation", ["per_block", "one"])
@pytest.mark.parametrize("config", [SIT, MMDIT], ids=["sit", "mmdit"])
def test_its_velocity_is_that_of_float64(config, modulation):
    model = made(replace(config, modulation=modulation), 2)
    seen = []
    x, t, condition = inputs(config)
    (model.t_embedder if config.network == "mmdit" else model.y_embedder).register_forward_hook(
        lambda module, given, out: seen.append(out.detach().double().numpy())
    )
    model.t_embedder.register_forward_hook(lambda module, given, out: seen.append(out.detach().double().numpy()))
    _, (stream, internal) = model(x, t, condition, tap=(2, INTERNAL))
    c = seen[0] if config.network == "mmdit" else seen[0] + seen[1]
    w = {key: tensor.double().numpy() for key, tensor in model.state_dict().items()}
    silu = c / (1 + np.exp(-c))
    modulation = silu @ w["final_layer_xr.adaLN_modulation.1.weight"].T + w["final_layer_xr.adaLN_modulation.1.bias"]
    shift, scale = modulation[:, None, :16], modulation[:, None, 16:]
    h = stream.detach().double().numpy()
    normed = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    patches = (normed * (1 + scale) + shift) @ w["final_layer_xr.linear.weight"].T + w["final_layer_xr.linear.bias"]
    expected = patches.reshape(2, 2, 3, 2, 2, 3).transpose(0, 5, 1, 3, 2, 4).reshape(2, 3, 4, 6)
    np.testing.assert_allclose(internal.detach().numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_of_a_network_that_predicts_x_the_head_gives_a_velocity_too():
    model = made(SIT, 1)
    x, t, labels = inputs(SIT)
    _, as_velocity = model(x, t, labels, INTERNAL)
    model.config = replace(model.config, prediction="x")
    _, of_x = model(x, t, labels, INTERNAL)
    assert torch.allclose(of_x, (x - as_velocity) / t.view(-1, 1, 1, 1), atol=1e-5)


def test_it_starts_at_zero_like_the_final_layer_where_that_does():
    headed = made(replace(SIT, zero_init=True), 3).final_layer_xr
    assert all(not parameter.any() for parameter in headed.parameters())
    drawn = made(SIT, 3).final_layer_xr
    assert drawn.linear.weight.any() and drawn.adaLN_modulation[1].weight.any()


@pytest.mark.parametrize("config", [SIT, MMDIT], ids=["sit", "mmdit"])
def test_parameters_are_counted(config):
    model = made(config, 2)
    assert model.config.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.parameters - config.parameters == 16 * 12 + 12 + 16 * 32 + 32


def test_a_network_without_one_says_so():
    with pytest.raises(ValueError, match="INTERNAL: the network has no internal head"):
        made(SIT)(*inputs(SIT), tap=INTERNAL)


def test_a_description_tells_of_it_only_where_it_is_there():
    assert "internal_head" not in SIT.described() and "internal_head" not in SIT.architecture()
    headed = replace(SIT, internal_head=2)
    assert headed.described()["internal_head"] == headed.architecture()["internal_head"] == 2
    assert headed.differences(SIT.architecture()) == ["internal_head 0 (this recipe: 2)"]
    assert SIT.differences(headed.architecture()) == ["internal_head 2 (this recipe: 0)"]


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match=r"model.internal_head = 4.*0 \(none\) or 1 to 3"):
        check_shapes(replace(SIT, internal_head=4))


def test_a_folder_keeps_it(tmp_path):
    model = made(SIT, 2)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert again.config.internal_head == 2
    assert torch.equal(again(*inputs(SIT), INTERNAL)[1], model(*inputs(SIT), INTERNAL)[1])
