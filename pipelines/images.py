"""Images from outside: checked before they are decoded, and always ending as plain RGB."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MAX_ASPECT = 50


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


def read_rgb(data: bytes) -> Image.Image:
    """Decode one image: first frame, upright as its EXIF says, transparency on white, 16 bits scaled to 8, RGB.

    Raises:
        BadImageError: empty, not an image of the known formats, cut short, far too large or far too narrow. Size is
            judged from the header, before any pixel is decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise BadImageError("the file is empty")
    if len(data) > MAX_BYTES:
        raise BadImageError(f"{len(data):,} bytes; the limit is {MAX_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImageError(f"{width}x{height} pixels; the limit is {MAX_PIXELS:,}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BadImageError(f"{width}x{height} is narrower than 1:{MAX_ASPECT}")
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise BadImageError(f"not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"cannot be decoded: {error}") from error
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the shorter side is `side` pixels; an image that small already is left as it is."""
    from PIL import Image

    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (max(side, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG with full-resolution colour, since thin coloured strokes fade when chroma is halved."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
