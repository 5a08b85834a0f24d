"""The embedded data set: its files agree with one another, and captions are true of exactly the scenes they should be.

The oracle below knows the grammar and the definitions from the data card alone: it reads a caption's words back and
tries every way of giving them digits. It shares no code with the generator.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pydantic
import pytest
from PIL import Image
from pycocotools.coco import COCO

from setwise.pipelines.digit_card import ambiguity
from setwise.pipelines.digit_scenes import COLOURS, SPLITS, Scene, handwriting, ink_coverage
from setwise.pipelines.digits import DigitsConfig, compose, extended_positives, generate

SMALL = DigitsConfig(train=12, val=6, test=40, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("digits") / "set"
    generate(path, SMALL)
    return path


def _read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- the oracle ---------------------------------------------------------------------------------------------------

ARTICLE_OBJECT = re.compile(
    r"an? (?:(?P<size>small|tiny|large|big) )?(?:(?P<colour>red|yellow|green|blue|purple|white) )?"
    r"(?:number |digit )?(?P<noun>zero|one|two|three|four|five|six|seven|eight|nine|number|digit)"
    r"(?: (?P<place>(?:on|in|at) the [a-z ]+))?"
)
TALLY = re.compile(
    r"(two|three|four) (?:(small|tiny|large|big) )?(?:([a-z]+) )?(?:digits|numbers) (?:and|including) (.*)"
)
RELATION = re.compile(r"(.*?) (above|over|below|beneath|under|(?:to the )?left of|(?:to the )?right of) (an? .*)")
NUMBERS = {
    word: n for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
}
ONE_SIZE = {"small": "small", "tiny": "small", "large": "large", "big": "large"}


def _things(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "value": digit.value,
            "colour": digit.colour,
            "size": digit.size,
            "x": (digit.box[0] + digit.box[2] / 2) / scene.side,
            "y": (digit.box[1] + digit.box[3] / 2) / scene.side,
        }
        for digit in scene.digits
    ]


def _is_like(thing: dict[str, Any], phrase: str) -> bool:
    match = ARTICLE_OBJECT.fullmatch(phrase)
    assert match, f"the oracle cannot read {phrase!r}"
    size, colour, noun, place = match.group("size", "colour", "noun", "place")
    if size and thing["size"] != ONE_SIZE[size]:
        return False
    if colour and thing["colour"] != colour:
        return False
    if noun in NUMBERS and thing["value"] != NUMBERS[noun]:
        return False
    words = (place or "").split()
    return (
        (not {"left"} & set(words) or thing["x"] < 0.35)
        and (not {"right"} & set(words) or thing["x"] > 0.65)
        and (not {"top", "upper"} & set(words) or thing["y"] < 0.35)
        and (not {"bottom", "lower"} & set(words) or thing["y"] > 0.65)
        and (not {"centre", "middle"} & set(words) or (0.35 < thing["x"] < 0.65 and 0.35 < thing["y"] < 0.65))
    )


def _stands(first: dict[str, Any], how: str, second: dict[str, Any]) -> bool:
    if how in ("above", "over"):
        return bool(second["y"] - first["y"] > 0.18)
    if how in ("below", "beneath", "under"):
        return bool(first["y"] - second["y"] > 0.18)
    if "left" in how:
        return bool(second["x"] - first["x"] > 0.18)
    return bool(first["x"] - second["x"] > 0.18)


def _is_true(text: str, things: list[dict[str, Any]]) -> bool:
    text = re.sub(r"^(a picture of|an image of|there is) ", "", text)
    if tally := TALLY.fullmatch(text):
        number, size, colour, text = tally.groups()
        alike = [
            t for t in things if (not size or t["size"] == ONE_SIZE[size]) and (not colour or t["colour"] == colour)
        ]
        if len(alike) != NUMBERS[number]:
            return False
    how = None
    if relation := RELATION.fullmatch(text):
        before, how, last = relation.groups()
        phrases = [*before.split(", and "), last]
    else:
        phrases = re.split(r", | and (?=an? )", text)
    for dealt in itertools.permutations(things, len(phrases)):
        fits = all(_is_like(thing, phrase) for thing, phrase in zip(dealt, phrases, strict=True))
        if fits and (how is None or _stands(dealt[-2], how, dealt[-1])):
            return True
    return False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red three", True),
        ("a red three and a red three", False),  # two mentions are two digits
        ("a three and a red number", False),
        ("a three and a green number", True),
        ("a red three over a green number seven", True),
        ("a green seven above a red three", False),
        ("a tiny white one on the right, and a red three above a green seven", True),
        ("two large digits and a small number one", True),
        ("two numbers including a red three", False),  # there are three
        ("an image of a big red three in the upper left corner", True),
        ("there is a three in the middle", False),
    ],
)
def test_oracle_reads_what_a_person_would(text: str, expected: bool) -> None:
    things = [
        {"value": 3, "colour": "red", "size": "large", "x": 0.25, "y": 0.25},
        {"value": 7, "colour": "green", "size": "large", "x": 0.30, "y": 0.75},
        {"value": 1, "colour": "white", "size": "small", "x": 0.80, "y": 0.50},
    ]
    assert _is_true(text, things) is expected


def test_extended_positives_agree_with_the_oracle() -> None:
    composed = compose(DigitsConfig(test=150, seed=11), "test")
    scenes = [_things(item.scene) for item in composed]
    texts = [caption.text for item in composed for caption in item.captions]
    for text, positives in zip(texts, extended_positives(composed), strict=True):
        expected = [position for position, things in enumerate(scenes) if _is_true(text, things)]
        assert positives.tolist() == expected, text


# --- scenes and captions ------------------------------------------------------------------------------------------


def test_about_a_third_of_the_captions_are_ambiguous_among_a_thousand_images() -> None:
    composed = compose(DigitsConfig(test=1000), "test")
    found = ambiguity(extended_positives(composed), images=1000)
    assert 0.25 <= found.ambiguous <= 0.42
    assert found.mean_positives < 4


def test_captions_are_short_varied_and_different_within_an_image() -> None:
    composed = compose(DigitsConfig(train=600), "train")
    captions = [caption for item in composed for caption in item.captions]
    assert all(4 <= len(caption.tokens) <= 14 for caption in captions)
    assert all(len({caption.text for caption in item.captions}) == 5 for item in composed)
    assert 40 <= len({word for caption in captions for word in caption.tokens}) <= 60
    assert not [c.text for c in captions if re.search(r"\ba eight|\ban (?!eight|image)", c.text)]


def test_nothing_in_a_scene_is_borderline_or_overlaps() -> None:
    for item in compose(DigitsConfig(train=300), "train"):
        side, digits = item.scene.side, item.scene.digits
        assert 2 <= len(digits) <= 4
        for digit in digits:
            x, y, width, height = digit.box
            assert x >= 0 and y >= 0 and x + width <= side and y + height <= side
            assert height <= 20 if digit.size == "small" else height >= 25
            assert all(abs(at - limit) >= 0.03 - 1e-9 for at in digit.centre(side) for limit in (0.35, 0.65))
        for one, other in itertools.combinations(digits, 2):
            apart = [abs(a - b) for a, b in zip(one.centre(side), other.centre(side), strict=True)]
            assert all(abs(distance - 0.18) >= 0.04 - 1e-9 for distance in apart)
            shown = [np.zeros((side, side), dtype=bool) for _ in range(2)]
            for mask, (x, y, width, height) in zip(shown, (one.box, other.box), strict=True):
                mask[y : y + height, x : x + width] = True
            assert not (shown[0] & shown[1]).any()


def test_splits_share_no_handwriting() -> None:
    used = {
        split: {
            digit.scan
            for item in compose(DigitsConfig(train=400, val=200, test=400), split)
            for digit in item.scene.digits
        }
        for split in SPLITS
    }
    assert not used["train"] & used["val"] and not used["train"] & used["test"] and not used["val"] & used["test"]
    allotted = [scan for split in SPLITS for scans in handwriting().allotted[split] for scan in scans]
    assert sorted(allotted) == list(range(1797))


def test_a_larger_set_begins_with_the_smaller_one() -> None:
    assert compose(DigitsConfig(val=30), "val")[:10] == compose(DigitsConfig(val=10), "val")
    assert compose(DigitsConfig(val=10, seed=1), "val") != compose(DigitsConfig(val=10), "val")


# --- files --------------------------------------------------------------------------------------------------------


def test_pycocotools_reads_captions_and_images_exist(folder: pathlib.Path) -> None:
    seen: set[int] = set()
    for part, images in (("train", 12), ("val", 6 + 40)):
        coco = COCO(folder / "annotations" / f"captions_{part}.json")
        assert len(coco.getImgIds()) == images
        assert len(coco.getAnnIds()) == 5 * images
        for image in coco.loadImgs(coco.getImgIds()):
            assert len(coco.getAnnIds(imgIds=image["id"])) == 5
            with Image.open(folder / "images" / part / image["file_name"]) as picture:
                assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 64))
                assert (image["width"], image["height"]) == picture.size
        assert len(list((folder / "images" / part).iterdir())) == images
        assert not seen & set(coco.getImgIds())
        seen |= set(coco.getImgIds())


def test_karpathy_file_agrees_with_coco(folder: pathlib.Path) -> None:
    captions: dict[str, dict[int, dict[str, Any]]] = {
        part: {a["id"]: a for a in _read(folder / "annotations" / f"captions_{part}.json")["annotations"]}
        for part in ("train", "val")
    }
    karpathy = _read(folder / "dataset_digits.json")
    assert karpathy["dataset"] == "digits"
    assert [image["imgid"] for image in karpathy["images"]] == list(range(58))
    splits = [image["split"] for image in karpathy["images"]]
    assert [splits.count(split) for split in SPLITS] == [12, 6, 40]
    for image in karpathy["images"]:
        assert (image["filepath"] == "train") == (image["split"] == "train")
        assert (folder / "images" / image["filepath"] / image["filename"]).is_file()
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        for sentence in image["sentences"]:
            annotation = captions[image["filepath"]].pop(sentence["sentid"])
            assert annotation["caption"] == sentence["raw"]
            assert annotation["image_id"] == image["cocoid"]
            assert sentence["imgid"] == image["imgid"]
            assert sentence["tokens"] == re.findall("[a-z]+", sentence["raw"])
    assert captions == {"train": {}, "val": {}}


def test_extended_positives_hold_the_test_split_both_ways(folder: pathlib.Path) -> None:
    to_caption = _read(folder / "extended_positives" / "image_to_caption.json")
    to_image = _read(folder / "extended_positives" / "caption_to_image.json")
    test = [image for image in _read(folder / "dataset_digits.json")["images"] if image["split"] == "test"]
    assert set(to_caption) == {str(image["cocoid"]) for image in test}
    assert set(to_image) == {str(sentid) for image in test for sentid in image["sentids"]}
    pairs = {(int(image), caption) for image, captions in to_caption.items() for caption in captions}
    assert pairs == {(image, int(caption)) for caption, images in to_image.items() for image in images}
    assert pairs > {(image["cocoid"], sentid) for image in test for sentid in image["sentids"]}


def test_pixels_show_the_digits_of_the_scene_file(folder: pathlib.Path) -> None:
    names, table = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    inks = handwriting().inks
    for image in _read(folder / "scenes.json")["images"]:
        with Image.open(folder / "images" / image["filepath"] / image["file_name"]) as picture:
            pixels = np.asarray(picture, dtype=float)
        assert 2 <= len(image["objects"]) <= 4
        for thing in image["objects"]:
            x, y, width, height = thing["box"]
            patch = pixels[y : y + height, x : x + width]
            coverage = ink_coverage(inks[thing["scan"]], width, height)
            stroke = np.median(patch[coverage > 0.95], axis=0)
            assert names[np.linalg.norm(table - stroke, axis=1).argmin()] == thing["colour"]
            ground = np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
            assert np.linalg.norm(ground - stroke) > 70


def test_data_card_tells_what_was_measured(folder: pathlib.Path) -> None:
    card = (folder / "DATA_CARD.md").read_text(encoding="utf-8")
    assert "| test | 40 | 200 | 539 |" in card
    assert "| first 40 | 200 |" in card
    assert "CC BY 4.0" in card
    assert max(map(len, card.splitlines())) <= 120


def test_equal_configurations_give_equal_bytes_in_any_process(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = (
        "import pathlib, sys; from setwise.pipelines.digits import DigitsConfig, generate; "
        "heavy = {'numpy', 'PIL', 'sklearn'} & set(sys.modules); assert not heavy, heavy; "
        f"generate(pathlib.Path('again'), DigitsConfig.model_validate_json('{SMALL.model_dump_json()}'))"
    )
    environment = {"PYTHONHASHSEED": "77", "PATH": ""}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    assert _hashes(tmp_path / "again") == _hashes(folder)


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_folder_with_something_in_it_is_refused(folder: pathlib.Path) -> None:
    with pytest.raises(FileExistsError, match="is not empty"):
        generate(folder, SMALL)


@pytest.mark.parametrize(
    "setting",
    [{"train": 0}, {"test": 20_001}, {"image_size": 32}, {"seed": -1}, {"jpeg_quality": 101}, {"testing": 5}],
)
def test_settings_out_of_bounds_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(pydantic.ValidationError):
        DigitsConfig.model_validate(setting)
