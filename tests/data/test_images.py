"""ADM's crop is the published arithmetic, and odd pictures become ordinary ones or are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from st_fast.data.images import BadImage, center_crop, decode_image, load_image
from st_fast.data.sources import open_source

from .conftest import encoded, picture


def cubic(x: float) -> float:
    """Keys' cubic convolution with a = −0.5, which Pillow calls BICUBIC; support 2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def box(x: float) -> float:
    """The box filter; support ½."""
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def resampled(pixels: np.ndarray, size: int, kernel: Callable[[float], float], support: float) -> np.ndarray:
    """The first axis to `size` by antialiased convolution in float64, rounded to 8 bits."""
    scale = len(pixels) / size
    stretch = max(scale, 1.0)
    rows = []
    for i in range(size):
        centre = (i + 0.5) * scale
        reach = support * stretch
        low, high = max(0, int(centre - reach + 0.5)), min(len(pixels), int(centre + reach + 0.5))
        weights = np.array([kernel((j - centre + 0.5) * (1.0 / stretch)) for j in range(low, high)])
        rows.append(np.tensordot(weights / weights.sum(), pixels[low:high].astype(np.float64), 1))
    return np.clip(np.floor(np.stack(rows) + 0.5), 0, 255)


def both_axes(
    pixels: np.ndarray, height: int, width: int, kernel: Callable[[float], float], support: float
) -> np.ndarray:
    wide = resampled(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resampled(wide, height, kernel, support)


def adm(pixels: np.ndarray, size: int) -> np.ndarray:
    """The crop by its definition, on (H, W, 3): halve by box filter, cubic resize, cut out the middle."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = both_axes(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    short = min(pixels.shape[:2])
    height, width = (round(Fraction(side * size, short)) for side in pixels.shape[:2])
    pixels = both_axes(pixels, height, width, cubic, 2.0)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "size", [(52, 40), (40, 53), (40, 40), (90, 64), (130, 260), (17, 31), (20, 20), (52, 33), (64, 200), (83, 161)]
)
def test_centre_crop_is_adms_definition(size: tuple[int, int]) -> None:
    image = picture(3, size)
    result = center_crop(image, 20)
    assert result.shape == (20, 20, 3) and result.dtype == np.uint8
    difference = np.abs(result - adm(np.asarray(image), 20))
    assert difference.max() <= 1 and difference.mean() < 0.1  # Pillow's weights are fixed-point numbers


def test_centre_crop_takes_the_middle() -> None:
    stripes = np.zeros((10, 31, 3), np.uint8)
    stripes[:, :, 0] = np.arange(31)
    assert center_crop(Image.fromarray(stripes), 10)[4, :, 0].tolist() == list(range(10, 20))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA", "LA", "YCbCr"])
def test_odd_modes_become_rgb(mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = picture(5, (24, 24)).convert(mode)
    result = load_image(encoded(image, kind), 24, 3)
    assert result.shape == (3, 24, 24) and result.dtype == np.uint8
    expected = np.asarray(image.convert("RGB"), float).transpose(2, 0, 1)
    assert np.abs(result - expected).mean() < 6  # JPEG's loss


def test_sixteen_bits_become_eight_by_scaling_not_by_clipping() -> None:
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    result = load_image(encoded(Image.fromarray(ramp)), 16, 3)
    assert np.array_equal(result[0].reshape(-1), np.arange(256)) and np.array_equal(result[0], result[2])


def test_alpha_is_laid_over_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    result = load_image(encoded(image), 8, 3)
    assert result[:, 0, 0].tolist() == [0, 0, 255] and result[:, 0, 7].tolist() == [255, 255, 255]


def test_one_channel_is_given_where_one_is_wanted() -> None:
    gray = load_image(encoded(picture(1)), 8, 1)
    assert gray.shape == (1, 8, 8) and gray.flags.writeable  # else torch warns


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify"),
        (b"\xff\xd8\xff\xe0 not a picture", "Truncated"),
        (encoded(picture(1, (90, 90)), "JPEG")[:-300], "truncated"),
        (encoded(picture(1, (90, 90)), "PNG")[:-300], "."),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "cannot identify"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode_image(data, 3)
    assert "\n" not in str(caught.value) and str(caught.value)


def test_a_decompression_bomb_is_refused() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(BadImage, match="DecompressionBomb"):
        decode_image(bomb, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says_unless_the_set_is_older(orientation: int) -> None:
    image, exif = picture(2, (24, 12)), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    pixels = np.asarray(image)
    turns = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels),
    }  # fmt: skip
    assert np.array_equal(np.asarray(decode_image(data, 3)), turns[orientation])
    assert np.array_equal(np.asarray(decode_image(data, 3, upright=False)), pixels)


def test_an_avif_is_counted_and_read_where_pillow_can(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = picture(5, (24, 16))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.AVIF").write_bytes(encoded(image, "AVIF", quality=100, subsampling="4:4:4"))
    source = open_source(tmp_path)
    assert len(source.names) == 1 and not source.left_out
    found = decode_image(source.read(0), 3)
    assert np.abs(np.asarray(found, np.int16) - np.asarray(image, np.int16)).max() < 12


def test_a_thin_image_is_not_blown_up_and_no_message_shows_an_address() -> None:
    with pytest.raises(BadImage, match=r"1 × 30000 pixels: to cover 256 × 256"):
        load_image(encoded(Image.new("RGB", (1, 30_000))), 256, 3)
    with pytest.raises(BadImage) as caught:
        decode_image(b"no picture", 3)
    assert "0x" not in str(caught.value) and "BytesIO" not in str(caught.value)
