"""Image files → uint8 arrays: odd pixel formats made ordinary, then ADM's centre crop."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps

from st_fast.core.errors import UserError, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "DIB", "TGA", "PCX", "SGI", "QOI")
"""What is opened, where this Pillow can. Others, such as EPS, would start foreign programs."""
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jpe",
    ".jfif", ".mpo", ".apng", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".dib", ".tga", ".pcx", ".sgi", ".qoi",
)  # fmt: skip
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
"""Of an image, and of one that is made larger to be cropped; Pillow's own limit."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # at half of that


Size = int | tuple[int, int]
"""Pixels: the side of a square, or height and width."""


def sides(size: Size) -> tuple[int, int]:
    """(Height, width)."""
    return size if isinstance(size, tuple) else (size, size)


def named_size(size: Size) -> str:
    """As options and manifests have it: "256", or "192x320", height first."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


class BadImage(UserError):
    """An image that can't be used; says why."""


def decode_image(data: bytes, channels: int, upright: bool = True) -> Image.Image:
    """Bytes of an image file → an image of 3 (RGB) or 1 (L) channels of 8 bits. `BadImage` where that can't be.

    Grayscale, palette and CMYK are converted, 16 bits become 8, alpha is laid over white. `upright` turns the image as
    its EXIF orientation says, as people see it; ADM's, EDM's and REPA's programs ignore that.
    """
    with _opened(data) as file:
        file.load()
        return _ordinary(_turned(file) if upright else file).convert("RGB" if channels == 3 else "L")


def image_sides(data: bytes) -> tuple[int, int]:
    """(Height, width) of an image file as people see it, by its header and its EXIF orientation; `BadImage` if none."""
    with _opened(data) as file:
        width, height = file.size
        try:
            turned = file.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        except Exception:  # a broken EXIF turns nothing, as in `_turned`
            turned = False
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image file, whatever Pillow raises meanwhile as `BadImage`."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as file:
            yield file
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        reason = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", first_line(error))[:120]
        raise BadImage(f"{type(error).__name__}: {''.join(c if c.isprintable() else '?' for c in reason)}") from None


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _turned(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says; as it is where the EXIF is broken."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever a broken EXIF makes Pillow stumble over: the pixels are sound
        return image


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


def center_crop(image: Image.Image, size: Size) -> np.ndarray:
    """ADM's centre crop (guided-diffusion, arXiv 2105.05233): halve by box filter while both sides are at least twice
    those of `size`, bicubic to the smallest image that covers it, cut the middle out. Returns uint8 (H, W[, 3]).
    """
    height, width = sides(size)
    scale = max(height / image.height, width / image.width)
    if (larger := image.width * image.height * scale**2) > MAX_PIXELS:
        raise BadImage(f"{image.width} × {image.height} pixels: to cover {height} × {width} {larger:.0f} pixels")
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]


def load_image(data: bytes, size: Size, channels: int, upright: bool = True) -> np.ndarray:
    """Bytes of an image file → uint8 (channels, H, W), writable. `BadImage` where that can't be."""
    pixels = center_crop(decode_image(data, channels, upright), size)
    return np.array(pixels.reshape(*sides(size), channels).transpose(2, 0, 1), order="C")
