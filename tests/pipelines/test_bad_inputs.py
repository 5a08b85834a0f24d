"""Bad images and captions through `shards.write`: stored, or set aside with the reason; none is lost, none fatal."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setwise.pipelines import shards
from setwise.pipelines.datasets import Caption, Row
from setwise.pipelines.images import decode_jpeg
from setwise.pipelines.shards import Shard


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(), "JPEG", exif=exif)


def damaged_exif() -> bytes:
    return encoded(noise(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xee" * 40)


JPEG = encoded(noise(), "JPEG", quality=90)
IMAGES: dict[str, tuple[bytes, str | None]] = {
    # the content of a file, and the reason for which it is set aside, if it is
    "a JPEG": (JPEG, None),
    "zero bytes": (b"", "the file is empty"),
    "nothing but zeros": (bytes(5000), "not a readable"),
    "a page": (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "not a readable"),
    "a GIF": (encoded(noise(), "GIF"), "not a readable"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "half a progressive JPEG": (encoded(noise(), "JPEG", progressive=True)[:1200], "cannot be decoded"),
    "the beginning of a JPEG": (JPEG[:3], "not a readable"),
    "a bomb": (header_only_png(5_100, 5_100), "5100x5100 pixels"),
    "a bomb that Pillow refuses": (header_only_png(20_000, 20_000), "cannot be decoded: Image size"),
    "1 x 60000": (encoded(Image.new("RGB", (1, 60_000)), "PNG"), "1x60000 is narrower than 1:50"),
    "1 x 1": (encoded(Image.new("RGB", (1, 1)), "PNG"), None),
    "CMYK": (encoded(noise(mode="CMYK"), "JPEG"), None),
    "16 bits": (encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG"), None),
    "animated": (animated(), None),
    "turned": (turned(), None),
    "damaged EXIF": (damaged_exif(), None),
    "grey": (encoded(noise(mode="L"), "JPEG"), None),
    "one bit": (encoded(noise(mode="1"), "PNG"), None),
    "palette with transparency": (encoded(noise(mode="P"), "PNG", transparency=3), None),
    "palette with many transparencies": (encoded(noise(mode="P"), "PNG", transparency=bytes(range(0, 250, 2))), None),
    "transparent": (encoded(noise(mode="RGBA"), "WEBP"), None),
    "grey with alpha": (encoded(noise(mode="LA"), "PNG"), None),
}


def write(folder: Path, contents: list[bytes], side: int | None) -> tuple[list[Row], Shard]:
    rows = []
    for number, data in enumerate(contents):
        path = folder / f"{number}.jpg"  # as many are called that are something else
        path.write_bytes(data)
        rows.append(Row(number, "train", path, (Caption(2 * number, "one"), Caption(2 * number + 1, "two"))))
    return rows, shards.write(folder / "train-00000.parquet", shards.load_rows(shards.dump_rows(rows)), side, 90)


def check_that_nothing_is_lost(folder: Path, rows: list[Row], shard: Shard) -> None:
    """Each image and each caption is in the shard, or set aside with a reason; what is stored can be decoded."""
    images = {bad["image_id"] for bad in shard.quarantine if bad["caption_id"] is None}
    captions = {bad["caption_id"] for bad in shard.quarantine} - {None}
    assert shard.images + len(images) == len(rows)
    of_stored = {caption.caption_id for row in rows if row.image_id not in images for caption in row.captions}
    assert shard.captions + len(captions & of_stored) == len(of_stored)
    assert all(bad["reason"] for bad in shard.quarantine)
    table = shards.read(folder, {"shards": [asdict(shard)]}, ("image_id", "caption_ids"))
    assert set(table.column("image_id").to_pylist()) == {row.image_id for row in rows} - images
    assert {place for places in table.column("caption_ids").to_pylist() for place in places} == of_stored - captions
    jpegs = shards.Jpegs(folder, {"shards": [asdict(shard)]})
    for index in range(len(jpegs)):
        assert decode_jpeg(jpegs[index]).shape[2] == 3


@pytest.mark.parametrize("side", [None, 32])
def test_every_kind_of_image_is_stored_or_has_its_reason(tmp_path: Path, side: int | None) -> None:
    rows, shard = write(tmp_path, [data for data, _ in IMAGES.values()], side)
    check_that_nothing_is_lost(tmp_path, rows, shard)
    reasons = {bad["image_id"]: bad["reason"] for bad in shard.quarantine}
    for number, (name, (_, reason)) in enumerate(IMAGES.items()):
        assert (number in reasons) == (reason is not None), (name, reasons.get(number))
        assert reason is None or reasons[number].startswith(reason), (name, reasons[number])


ENCODINGS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: JPEG,
    "progressive JPEG": lambda: encoded(noise(), "JPEG", progressive=True),
    "PNG": lambda: encoded(noise(), "PNG"),
    "WEBP": lambda: encoded(noise(), "WEBP"),
}


@pytest.mark.parametrize("kind", ENCODINGS)
def test_images_cut_anywhere_are_not_fatal(tmp_path: Path, kind: str) -> None:
    data = ENCODINGS[kind]()
    cuts = [data[: len(data) * part // 40] for part in range(40)] + [data[:-length] for length in (1, 2, 3, 12)]
    rows, shard = write(tmp_path, cuts, None)
    check_that_nothing_is_lost(tmp_path, rows, shard)
    assert len(shard.quarantine) >= 38


@pytest.mark.parametrize("kind", ENCODINGS)
def test_images_with_bytes_exchanged_are_not_fatal(tmp_path: Path, kind: str) -> None:
    data, dice = ENCODINGS[kind](), random.Random(0)
    contents = []
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 5)):
            changed[dice.randrange(len(changed)) if dice.random() < 0.5 else dice.randrange(300)] = dice.randrange(256)
        contents.append(bytes(changed))
    rows, shard = write(tmp_path, contents, 32)
    check_that_nothing_is_lost(tmp_path, rows, shard)


def test_captions_are_kept_cleaned_or_set_aside(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(JPEG)
    texts: dict[str, str | None] = {
        "a plain one": "a plain one",
        "  two\tspaces\r\n and a line ": "two spaces and a line",
        "": None,
        " \n\t": None,
        "\u3000\u2003": None,  # spaces of other scripts
        "dog " * 10_000: None,
        "of bytes \udcff that are no text": None,
        "replaced \ufffd already": None,
        "a NUL \x00 inside": None,
        "cafe\u0301 \U0001f415 \u05e9\u05dc\u05d5\u05dd": "cafe\u0301 \U0001f415 \u05e9\u05dc\u05d5\u05dd",
    }
    captions = tuple(Caption(number, text) for number, text in enumerate(texts))
    rows = [Row(1, "train", tmp_path / "x.jpg", captions), Row(2, "train", tmp_path / "x.jpg", captions[2:5])]
    rows += [Row(3, "train", tmp_path / "x.jpg", ()), Row(4, "train", tmp_path / "x.jpg", (Caption(99, None),))]  # type: ignore[arg-type]
    shard = shards.write(tmp_path / "train-00000.parquet", shards.load_rows(shards.dump_rows(rows)), 64, 90)
    stored = shards.read(tmp_path, {"shards": [asdict(shard)]}, ("captions",)).column("captions").to_pylist()
    assert stored == [[kept for kept in texts.values() if kept is not None]]
    assert {bad["image_id"] for bad in shard.quarantine if bad["caption_id"] is None} == {2, 3, 4}
    check_that_nothing_is_lost(tmp_path, rows, shard)
