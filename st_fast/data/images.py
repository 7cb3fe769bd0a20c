"""Image files → uint8 arrays: odd pixel formats made ordinary, then ADM's centre crop."""

import io

import numpy as np
from PIL import Image

from st_fast.core.errors import UserError, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is opened. Others, such as EPS, would start foreign programs."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class BadImage(UserError):
    """An image that can't be used; says why."""


def decode_image(data: bytes, channels: int) -> Image.Image:
    """Bytes of an image file → an image of 3 (RGB) or 1 (L) channels of 8 bits. `BadImage` where that can't be.

    Grayscale, palette and CMYK are converted, 16 bits become 8, alpha is laid over white, EXIF rotation is ignored as
    in the published preprocessing.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            file.load()
            return _ordinary(file).convert("RGB" if channels == 3 else "L")
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise BadImage(f"{type(error).__name__}: {first_line(error)[:120]}") from None


def _ordinary(image: Image.Image) -> Image.Image:
    """To 8 bits without alpha."""
    if image.mode.startswith("I"):  # 16 bits, which newer Pillows name I;16 and older ones I
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65_535:
            raise BadImage(f"32-bit pixels between {pixels.min()} and {pixels.max()}")
        return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop (guided-diffusion, arXiv 2105.05233): halve by box filter while the shorter side is at least
    twice `size`, bicubic to `size` on the shorter side, cut the middle out. Returns uint8 (size, size[, 3]).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def load_image(data: bytes, size: int, channels: int) -> np.ndarray:
    """Bytes of an image file → uint8 (channels, size, size). `BadImage` where that can't be."""
    pixels = center_crop(decode_image(data, channels), size)
    return np.ascontiguousarray(pixels.reshape(size, size, channels).transpose(2, 0, 1))
