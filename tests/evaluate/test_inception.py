"""The FID network has the published layout, reads files of it strictly, and resizes as TensorFlow 1 did."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from st_fast.core.errors import UserError
from st_fast.evaluate import inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    """Random weights under the published names: small, but with every statistic away from its default."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, like in inception.InceptionV3().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        spread = 1 / like[0].numel() ** 0.5 if like.ndim > 1 else 0.1
        base = 1.0 if name.endswith(("running_var", "bn.weight")) else 0.0
        tensors[name] = base + spread * torch.randn(like.shape, generator=generator).clamp(-3, 3)
    return tensors


def test_names_and_sizes_are_those_of_the_published_weights(weights):
    assert len(weights) == 94 * 5 + 2
    parameters = {n: t for n, t in weights.items() if not n.endswith(("running_mean", "running_var"))}
    # torchvision's count without the auxiliary classifier, 23,834,568, and eight more classes
    assert sum(t.numel() for t in parameters.values()) == 23_834_568 + 8 * 2_049
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3dbl_3.bn.running_mean": (96,),
        "Mixed_6d.branch7x7dbl_3.conv.weight": (160, 160, 1, 7),
        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "fc.weight": (1008, 2048),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes


def test_a_file_of_that_layout_loads_strictly_and_gives_features_of_the_right_kind(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    network = inception.load_inception(tmp_path / "w.pth", CPU)
    found = network(images)
    assert [part.shape for part in found] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008)]
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    logits = found.pooled @ weights["fc.weight"].numpy().T  # without the bias
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, expected / expected.sum(axis=1, keepdims=True), rtol=2e-3)
    assert found.pooled.std() > 0 and np.abs(found.pooled[0] - found.pooled[1]).max() > 1e-6
    again = inception.load_inception(tmp_path / "w.safetensors", CPU)(images[1:])
    np.testing.assert_allclose(again.pooled, found.pooled[1:], rtol=1e-4, atol=1e-6)
    assert len(network.sha256) == 64
    # As torch up to 1.5 wrote it, and with the table of versions that a module's state dict carries.
    torch.save(network.model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = inception.load_inception(tmp_path / "old.pth", CPU).model.state_dict()
    assert all(torch.equal(old[name], tensor) for name, tensor in weights.items())


def test_spatial_features_are_seven_maps_of_mixed_6d_with_channels_last(weights):
    model = inception.InceptionV3().eval()
    model.load_state_dict(weights)
    kept = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        _, spatial, _ = model(torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)))
    assert kept[0].shape == (1, 192, 17, 17) and (kept[0] >= 0).all(), "after the ReLU"
    maps = spatial.view(17, 17, 7)
    assert all(torch.equal(maps[..., c], kept[0][0, c]) for c in range(7))


def test_averages_leave_the_padding_out_and_the_last_block_takes_the_maximum():
    pooled = []
    for block in (inception.block_8(8, "average"), inception.block_8(8, "maximum")):
        block.branch_pool.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
        block.eval()(torch.arange(16.0).view(1, 1, 4, 4).expand(1, 8, 4, 4))
    corner = torch.tensor([0.0, 1.0, 4.0, 5.0])
    assert pooled[0][0, 0, 0, 0] == corner.mean() and pooled[1][0, 0, 0, 0] == corner.max()
    assert isinstance(block.branch1x1.bn, nn.BatchNorm2d) and block.branch1x1.bn.eps == 1e-3


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (300, 299)])
def test_the_resize_is_tensorflow_1s(size):
    image = np.random.default_rng(1).random((*size, 1))
    found = inception.tensorflow_resize(torch.from_numpy(image).permute(2, 0, 1)[None].float(), 13)[0, 0].numpy()
    for i in range(13):
        for j in range(13):
            y, x = i * size[0] / 13, j * size[1] / 13
            top, left = int(y), int(x)
            low, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
            a, b = y - top, x - left
            upper = (1 - b) * image[top, left, 0] + b * image[top, right, 0]
            lower = (1 - b) * image[low, left, 0] + b * image[low, right, 0]
            assert found[i, j] == pytest.approx((1 - a) * upper + a * lower, abs=1e-4)


def test_weights_that_are_missing_or_do_not_fit_are_told_in_one_line(weights, tmp_path, monkeypatch):
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({name: t for name, t in weights.items() if name != "fc.bias"}, tmp_path / "short.pth")
    torch.save({**weights, "AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "more.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    torch.save({**weights, "fc.bias": torch.zeros(1).expand(2**40)}, tmp_path / "huge.pth")  # 4 TiB in a few bytes
    torch.save({"state_dict": [1]}, tmp_path / "list.pth")
    words = {"none.pth": "no such file; pass weights-inception", "short.pth": "fc.bias", "more.pth": "AuxLogits"}
    for name in ("none.pth", "text.pth", "short.pth", "more.pth", "module.pth", "huge.pth", "list.pth"):
        with pytest.raises(UserError) as error:
            inception.load_inception(tmp_path / name, CPU)
        assert name in str(error.value) and words.get(name, "") in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception.find_weights(None) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.FILES[1]).touch()
    assert inception.find_weights(None) == tmp_path / "checkpoints" / inception.FILES[1]
