"""Images from outside: right pixels for every kind there is, a reason for every one that cannot be used."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setwise.pipelines.images import (
    BadImageError,
    decode_jpeg,
    encode_jpeg,
    may_stay,
    read_file,
    read_rgb,
    resize_shorter_side,
)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def pixel(data: bytes, x: int = 2, y: int = 2) -> tuple[int, ...]:
    image = read_rgb(data)
    assert image.mode == "RGB"
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def raw_png(width: int, height: int, depth: int, colour: int, pixels: bytes, hidden: bytes = b"") -> bytes:
    """A PNG as its parts say; `hidden` is the value that stands for transparency, as its chunk tRNS has it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    transparency = chunk(b"tRNS", hidden) if hidden else b""
    return b"\x89PNG\r\n\x1a\n" + header + transparency + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has width x height pixels."""
    return raw_png(width, height, 8, 2, b"")


def deep_png(values: list[tuple[int, ...]], hidden: tuple[int, ...]) -> bytes:
    """A row of pixels of 16 bits, grey or RGB, one of whose values is transparent."""
    colour = 0 if len(hidden) == 1 else 2
    pixels = b"\0" + b"".join(struct.pack(f">{len(value)}H", *value) for value in values)
    return raw_png(len(values), 1, 16, colour, pixels, struct.pack(f">{len(hidden)}H", *hidden))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(Image.new("RGB", (8, 8), (10, 20, 30))), (10, 20, 30)),
        (png(Image.new("L", (8, 8), 77)), (77, 77, 77)),
        (png(Image.new("RGBA", (8, 8), (10, 20, 30, 0))), (255, 255, 255)),
        (png(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), (127, 127, 127)),
        (png(Image.new("LA", (8, 8), (50, 255))), (50, 50, 50)),
        (png(Image.new("P", (8, 8), 0), transparency=0), (255, 255, 255)),
        (png(Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))), (255, 255, 255)),
        (png(Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16))), (100, 100, 100)),
        (png(Image.new("1", (8, 8), 1)), (255, 255, 255)),
        (png(Image.new("RGB", (1, 1), (5, 6, 7))), None),
    ],
)
def test_every_kind_becomes_rgb(data: bytes, expected: tuple[int, ...] | None) -> None:
    if expected is None:
        assert read_rgb(data).size == (1, 1)
    else:
        assert pixel(data) == pytest.approx(expected, abs=1)


def test_cmyk_becomes_rgb() -> None:
    assert pixel(jpeg(Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK"))) == pytest.approx((200, 30, 40), abs=6)


def test_an_image_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left comes up
    upright = read_rgb(jpeg(image, exif=exif))
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4)) > (200, 200, 200) and upright.getpixel((8, 28)) < (50, 50, 50)  # type: ignore[operator]


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(buffer.getvalue()) == (255, 0, 0)


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not a readable JPEG"),
        (b"<html><body>404</body></html>", "not a readable JPEG"),
        (gif(), "not a readable JPEG"),
        (jpeg(Image.effect_noise((64, 64), 50))[:900], "cannot be decoded"),
        (bomb(40_000, 40_000), "pixels"),  # so many that Pillow refuses, then some at which it only warns, then fewer
        (bomb(12_000, 12_000), "pixels"),
        (bomb(6_000, 6_000), "pixels; the limit"),
        (png(Image.new("RGB", (6000, 1))), "narrower"),
        (b"\xff" * 20_000_001, "bytes; the limit"),
    ],
    ids=["empty", "text", "page", "gif", "cut short", "bomb 1", "bomb 2", "bomb 3", "narrow", "too long"],
)
def test_what_cannot_be_used_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        read_rgb(data)


@pytest.mark.parametrize(("size", "expected"), [((100, 50), (64, 32)), ((50, 100), (32, 64)), ((30, 20), (30, 20))])
def test_the_shorter_side_is_reduced_and_never_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_shorter_side(Image.new("RGB", size), 32).size == expected


def test_thin_coloured_strokes_keep_their_colour() -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste((255, 0, 0), (15, 0, 16, 32))  # one pixel wide
    red, green, _ = read_rgb(encode_jpeg(image, 95)).getpixel((15, 16))  # type: ignore[misc]
    assert red > 200 and green < 40


def test_one_value_of_16_bits_may_be_transparent() -> None:
    grey = read_rgb(deep_png([(257 * 100,), (257 * 100 + 1,), (0,)], hidden=(257 * 100,)))
    assert [grey.getpixel((x, 0)) for x in range(3)] == [(255,) * 3, (100,) * 3, (0,) * 3]
    colour = read_rgb(deep_png([(257 * 9, 0, 0), (257 * 200, 257 * 100, 50)], hidden=(257 * 9, 0, 0)))
    assert [colour.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 0)]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((width, height), 80).convert(mode)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(noise(40, 30)),
        jpeg(noise(40, 30), subsampling=2),
        jpeg(noise(41, 31), subsampling=1, progressive=True),
        jpeg(noise(40, 30, "L")),
        jpeg(noise(1, 1)),
        jpeg(noise(40, 30), exif=Image.Exif()),
        jpeg(noise(40, 30)) + b"something behind the end",
    ],
    ids=["full colour", "4:2:0", "4:2:2, odd, progressive", "grey", "1x1", "empty EXIF", "longer"],
)
def test_a_jpeg_that_may_stay_decodes_to_the_same_pixels_both_ways(data: bytes) -> None:
    assert may_stay(data, None)
    assert np.array_equal(decode_jpeg(data), np.asarray(read_rgb(data)))
    assert np.array_equal(decode_jpeg(np.frombuffer(data, np.uint8)), decode_jpeg(data)), "out of a mapped file too"


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("data", "side"),
    [
        (jpeg(noise(40, 30, "CMYK")), None),
        (jpeg(noise(40, 30), exif=turned(6)), None),
        (jpeg(noise(40, 30)), 29),
        (png(noise(40, 30)), None),
        (jpeg(noise(200, 200))[:4000], None),
        (jpeg(noise(200, 200), progressive=True)[:-40], None),
    ],
    ids=["CMYK", "turned", "too large", "PNG", "cut short", "progressive, cut short"],
)
def test_others_may_not_stay(data: bytes, side: int | None) -> None:
    assert not may_stay(data, side)


def test_upright_and_just_small_enough_may_stay() -> None:
    assert may_stay(jpeg(noise(40, 30), exif=turned(1)), 30)
    with pytest.raises(BadImageError, match="narrower"):
        may_stay(jpeg(noise(600, 1)), None)


def test_a_jpeg_whose_channels_are_rgb_already_keeps_its_colours() -> None:
    """Without Adobe's transformation of colours, and said so by its marker."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 40)).save(buffer, "JPEG", quality=95, keep_rgb=True)
    data = buffer.getvalue()
    assert pixel(data) == pytest.approx((200, 30, 40), abs=3)
    assert not may_stay(data, None) or decode_jpeg(data)[2, 2] == pytest.approx((200, 30, 40), abs=3)


def cut_in_the_middle(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3] + b"\xff\xd9"


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_some_of_its_pixels_is_none_although_it_ends_as_one(mode: str, options: dict[str, bool]) -> None:
    """Pillow would put grey in their place."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    whole = jpeg(Image.fromarray(noise).convert(mode), **options)
    assert read_rgb(whole).size == (80, 60)
    with pytest.raises(BadImageError, match=r"pixels are damaged: .*premature end"):
        read_rgb(cut_in_the_middle(whole))


def test_bytes_too_many_in_a_jpeg_cost_no_pixel() -> None:
    whole = jpeg(Image.new("RGB", (80, 60), "red"))
    more = whole[:-2] + bytes(64) + whole[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        decode_jpeg(more)
    assert read_rgb(more).tobytes() == read_rgb(whole).tobytes()


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadImageError, match="no file"):
        read_file(tmp_path / "pipe.jpg")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    """Of a TiB, of which none is on the disk."""
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", 2**40)
    with pytest.raises(BadImageError, match="1,099,511,627,776 bytes; the limit is 20,000,000"):
        read_file(tmp_path / "huge.jpg")
