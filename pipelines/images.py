"""Images from outside: checked before they are decoded, and always ending as plain RGB.

What a preparation stores are JPEGs that libjpeg-turbo decodes without a complaint; a training reads those alone, with
`decode_jpeg`, and everything else is read with `read_rgb`.
"""

from __future__ import annotations

import io
import stat
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MAX_ASPECT = 50
ORIENTATION = 0x0112
"""The tag of EXIF that says how a picture is to be turned; 1 is upright."""
GAPS = ("premature end of data segment", "bad Huffman code", "bad arithmetic code", "instead of RST")
"""What libjpeg-turbo says of pixels that are not there. Other complaints, such as bytes too many, cost no pixel."""


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


def read_file(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        OSError: it is not there, or cannot be read.
        BadImageError: it is no file, such as a pipe, on which reading would wait for ever; or far too large, which is
            seen before anything is read.
    """
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # of a folder, reading says what it is
        raise BadImageError("is no file")
    if status.st_size > MAX_BYTES:
        raise BadImageError(f"{status.st_size:,} bytes; the limit is {MAX_BYTES:,}")
    return path.read_bytes()


def read_rgb(data: bytes) -> Image.Image:
    """Decode one image: first frame, upright as its EXIF says, transparency on white, 16 bits scaled to 8, RGB.

    Raises:
        BadImageError: empty, not an image of the known formats, cut short or with a gap in its pixels, far too large or
            far too narrow. Size is judged from the header, before any pixel is decoded.
    """
    from PIL import Image, ImageOps

    image = _open(data)
    # The tile says how pixels are packed; once they are read, nothing tells that they had 16 bits.
    is_deep = bool(image.tile) and "16" in str(image.tile[0][3])
    try:
        image = _decoded(image, data)
        with warnings.catch_warnings(action="ignore"):
            ImageOps.exif_transpose(image, in_place=True)
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImageError(f"cannot be decoded: {error}") from error
    if image.mode.startswith("I;16"):
        image = _grey_of_16_bits(image)
    elif is_deep and isinstance(hidden := image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(value >> 8 for value in hidden)  # pixels have their upper 8 bits now
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    rgb: Image.Image = image if image.mode == "RGB" else image.convert("RGB")
    return rgb


def _open(data: bytes) -> Any:
    """The image, of which only the header is read yet. Raises BadImageError as `read_rgb` says."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImageError("the file is empty")
    if len(data) > MAX_BYTES:
        raise BadImageError(f"{len(data):,} bytes; the limit is {MAX_BYTES:,}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged EXIF, which is read as far as it goes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImageError(f"not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"cannot be decoded: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} pixels; the limit is {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError(f"{width}x{height} is narrower than 1:{MAX_ASPECT}")
    return image


def _decoded(image: Any, data: bytes) -> Any:
    """The image with its pixels. Raises BadImageError where pixels of a JPEG are missing, for which Pillow would put
    grey, and what Pillow raises where it cannot decode it."""
    from PIL import Image

    if data.startswith(b"\xff\xd8"):
        try:
            if image.mode == "CMYK":
                decode_jpeg(data, colours="CMYK")
            else:
                whole = Image.fromarray(decode_jpeg(data))
                whole.info = dict(image.info)  # how it is to be turned
                return whole
        except ValueError as error:
            if any(sign in str(error) for sign in GAPS):
                raise BadImageError(f"its pixels are damaged: {error}") from error
    image.load()
    return image


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """8 bits of grey and, where one value of the 16 bits stands for transparency, alpha."""
    import numpy as np
    from PIL import Image

    hidden = image.info.get("transparency")
    grey = image.point(lambda value: value / 257).convert("L")
    grey.info.pop("transparency", None)
    if hidden is None:
        return grey
    alpha = np.where(np.asarray(image) == hidden, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def may_stay(data: bytes, shorter_side: int | None) -> bool:
    """Whether an image can be stored as it came: a JPEG, RGB or grey, upright, with a shorter side of at most
    `shorter_side` pixels, that decodes without a complaint.

    Raises:
        BadImageError: the header already says that it cannot be used.
    """
    image = _open(data)
    try:
        with warnings.catch_warnings(action="ignore"):
            upright = image.getexif().get(ORIENTATION, 1) == 1
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):  # damaged EXIF, of which Pillow raises any of these
        return False
    is_small = shorter_side is None or min(image.size) <= shorter_side
    if not data.startswith(b"\xff\xd8") or image.mode not in ("L", "RGB") or not upright or not is_small:
        return False
    try:
        decode_jpeg(data)
    except ValueError:
        return False
    return True


def decode_jpeg(data: bytes | np.ndarray, memory: np.ndarray | None = None, colours: str = "RGB") -> np.ndarray:
    """Pixels (H, W, 3) uint8 of a JPEG; the same as Pillow's.

    Args:
        colours: CMYK, of which each pixel has four, for a JPEG that has no others.
        memory: where the pixels are put if there is room; new memory for each image would cost a fifth more time.

    Raises:
        ValueError: libjpeg-turbo cannot decode it, or complains.
    """
    import simplejpeg

    if memory is not None:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if height * width * 3 > memory.size:
            memory = None
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colours, buffer=memory)
    return pixels


def resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the shorter side is `side` pixels; an image that small already is left as it is."""
    from PIL import Image

    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (max(side, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image, quality: int, halved_colour: bool = False) -> bytes:
    """JPEG with colour in full resolution, or in half of it as cameras store it: half the bytes, and thin coloured
    strokes fade."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=2 if halved_colour else 0)
    return buffer.getvalue()
