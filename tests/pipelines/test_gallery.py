"""The gallery: which queries it shows, what it says of them, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import browser
from setwise.pipelines import batches, cli, evaluate, gallery, index, prepare, recipe, trained_model
from setwise.pipelines.cards import Measured
from setwise.pipelines.datasets import SPLITS, Caption, Row, Source
from setwise.pipelines.embeddings import Embeddings
from setwise.pipelines.prepare import PrepareConfig
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.retrieval import Retrieval
from setwise.platform import checkpoint, config, run, seeding, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.tracking import Tracker
from tiny import TINY_MODEL, regions_source, write_serially

EVIL = '<script>document.title = "taken"</script> & "quoted" <img src=x onerror=alert(1)>'
CARDS = """() => [...document.querySelectorAll('article')].map(card => ({
  title: card.querySelector('h3').textContent,
  label: [...card.querySelectorAll('.asked p, .asked h3')].map(p => p.textContent).join(' '),
  lists: [...card.querySelectorAll('ol')].map(list => [...list.children].map(li => ({
    text: li.textContent, rank: li.querySelector('.rank').textContent,
    mark: (li.querySelector('.mark') || {}).textContent, score: li.querySelector('.score').textContent}))),
}))"""


def untrained(store: Path, settings: Recipe, name: str, seed: int = 0) -> Reference:
    """A run whose best checkpoint has random weights."""
    prepared = prepare.open_prepared(settings.data.name, store)
    words = batches.open_words(settings, prepared)
    seeding.seed_everything(seed)
    retrieval = Retrieval(settings, len(words))
    made = run.create(store / "runs", name, config.to_yaml(settings), experiment="tests")
    metadata = {"epoch": 1, "recipe": settings.model_dump(mode="json"), "vocabulary": list(words.words)}
    checkpoint.save(made.checkpoints / "epoch_0001", retrieval.state_dict(), metadata, None)
    storage.write_json(made.folder / "best.json", {"checkpoint": "epoch_0001", "value": 0.0})
    return Reference(name, made.checkpoints / "epoch_0001", made)


@pytest.fixture(scope="module")
def place(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `digits`, with `regions`, and with `evil`, whose captions are no honest sentences."""
    folder = tmp_path_factory.mktemp("gallery")
    shutil.copytree(store / "data", folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_write_shards", write_serially)
        for source in (evil_source(folder / "evil"), regions_source(folder / "regions")):
            prepare.prepare(source, folder / "data" / source.name / "prepared", PrepareConfig(), lambda message: None)
    return folder


def evil_source(folder: Path, count: int = 36) -> Source:
    """Images that are wider than high, with captions that would be code in a page that believed them."""
    folder.mkdir()
    rows = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (50, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
        captions = (Caption(2 * number, f"{EVIL} word{number}"), Caption(2 * number + 1, f"{'long' * 60} word{number}"))
        rows.append(Row(number, SPLITS[number % 3], folder / f"{number}.jpg", captions))
    (folder / "annotations.json").write_text("[]")
    return Source("evil", "images", rows, (folder / "annotations.json",), [], [], None)


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    return recipe.load("digits_cnn_bigru", TINY_MODEL)


@pytest.fixture(scope="module")
def digits(place: Path, tiny: Recipe) -> Reference:
    return untrained(place, tiny, "digits-k4")


@pytest.fixture(scope="module")
def alone(place: Path, digits: Reference) -> str:
    return gallery.make(digits, place, queries=24)


@pytest.fixture(scope="module")
def window() -> Iterator[browser.Visit]:
    with browser.page() as visit:
        yield visit


@pytest.fixture
def open_page(window: browser.Visit) -> browser.Visit:
    """The one window of all tests, wide, light, and with nothing gone wrong."""
    for seen in (window.errors, window.requests, window.outside):
        seen.clear()
    window.page.set_viewport_size({"width": 1400, "height": 900})
    window.page.emulate_media(color_scheme="light")
    return window


def read_cards(visit: browser.Visit, html: str, folder: Path) -> list[dict[str, Any]]:
    (folder / "page.html").write_text(html, encoding="utf-8")
    visit.open(folder / "page.html")
    found: list[dict[str, Any]] = visit.page.evaluate(CARDS)
    return found


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_what_the_page_says_of_queries_is_what_evaluation_recorded(
    place: Path, digits: Reference, alone: str, open_page: browser.Visit, tmp_path: Path
) -> None:
    assert digits.run is not None
    recorded = {name: evaluate.ranks(digits.run, name) for name in ("digits_5k", "digits_extended")}
    model = trained_model.load(digits.checkpoint)
    prepared = prepare.open_prepared("digits", place)
    split = index.open_split(model, prepared, "test")
    sets = index.embeddings(model, prepared, split, place)
    scores = model.retrieval.similarity(sets.image_sets.double(), sets.text_sets.double()).float().detach().numpy()
    truth = json.loads((prepared.folder / "extended_positives" / "image_to_caption.json").read_bytes())

    seen = read_cards(open_page, alone, tmp_path)
    right = [min(6, int((recorded["digits_extended"][side].ranks == 1).sum())) for side in ("i2t", "t2i")]
    assert len(seen) == 12 + sum(right) and sum(right)
    kinds = []
    for card in seen:
        kind, query = re.search(r"(image|caption) (\d+)", card["label"]).groups()  # type: ignore[union-attr]
        direction = "i2t" if kind == "image" else "t2i"
        for benchmark, ranks in recorded.items():
            (rank,) = ranks[direction].ranks[ranks[direction].ids == int(query)]
            assert f"rank {rank:,} by {benchmark}" in card["label"]
        kinds.append((direction, rank > 1))
        if direction == "i2t":
            row = int(np.flatnonzero(split.image_ids == int(query))[0])
            line, own = scores[row], split.owners == row
            true = np.isin(split.caption_ids, truth[query])
        else:
            column = int(np.flatnonzero(split.caption_ids == int(query))[0])
            line, own = scores[:, column], np.arange(len(split)) == split.owners[column]
            true = np.array([int(query) in truth.get(str(image), ()) for image in split.image_ids])
        (answers,) = card["lists"]
        order = np.lexsort((np.arange(len(line)), own, -line))
        marks = {True: "✓ right", False: "✗ wrong"}
        for answer, item in zip(answers[:5], order[:5], strict=True):
            expected = marks[bool(own[item])] if own[item] or not true[item] else "≈ also true"
            assert answer["mark"] == expected and float(answer["score"]) == pytest.approx(line[item], abs=6e-4)
        first_right = int(np.flatnonzero(own[order])[0]) + 1
        shown = [number(answer["rank"]) for answer in answers if answer["mark"] == "✓ right"]
        assert shown[0] == first_right and len(answers) == (5 if first_right <= 5 else 6)
        assert [number(answer["rank"]) for answer in answers[:5]] == [1, 2, 3, 4, 5]
    wrong = [direction for direction, is_wrong in kinds if is_wrong]
    assert wrong == ["i2t"] * 6 + ["t2i"] * 6 and kinds[:12] == [(direction, True) for direction in wrong]
    assert "digits_extended" in alone and "ties count against the model" in alone and "digits-k4" in alone


def test_choosing_takes_the_worst_once_an_image_and_spreads_what_is_right() -> None:
    images = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    ranks = np.array([9, 7, 1, 8, 0, 9, 1, 1])
    assert gallery.choose(ranks, None, images, 5, 2) == ([0, 5, 3], [2, 7])
    assert gallery.choose(ranks, None, images, 1, 9) == ([0], [2, 6, 7])
    assert gallery.choose(ranks, None, images, 0, 0) == ([], [])
    assert gallery.choose(np.zeros(8, np.int64), None, images, 3, 3) == ([], [])
    many = np.ones(100, np.int64)
    assert gallery.choose(many, None, np.arange(100), 3, 4) == ([], [12, 37, 62, 87])


def test_beside_another_model_only_what_changed_sides_is_chosen_by_how_much() -> None:
    images = np.arange(7)
    before, after = np.array([1, 1, 5, 9, 3, 1, 0]), np.array([4, 6, 1, 1, 2, 1, 0])
    assert gallery.choose(after, before, images, 9, 9) == ([1, 0], [3, 2])
    assert gallery.choose(after, before, images, 1, 1) == ([1], [3])


def test_of_equal_scores_what_is_right_comes_last(place: Path, digits: Reference) -> None:
    model = trained_model.load(digits.checkpoint)
    random = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(30, 2, 16, generator=random), dim=2)
    texts[10:20] = texts[3]
    none = torch.arange(0)
    measured = Measured("x", model, Embeddings(texts[:1], texts, none, none, none), {})
    found = measured.answers("i2t", texts[3], np.array([3, 12, 29]))
    assert [item for item, _ in found] == [10, 11, 13, 14, 15, 3]
    assert len({score for _, score in found}) == 1
    assert measured.answers("i2t", texts[29], np.array([29]))[0][0] == 29


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (420, True), (420, False)])
def test_the_page_opens_offline_and_reads_well(
    alone: str, open_page: browser.Visit, tmp_path: Path, width: int, dark: bool
) -> None:
    page = open_page.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme="dark" if dark else "light")
    read_cards(open_page, alone, tmp_path)
    assert open_page.errors == [] and open_page.outside == [] and not open_page.scrolls_sideways()
    assert [one for one in open_page.requests if not one.startswith("data:")] == [(tmp_path / "page.html").as_uri()]
    assert page.locator("img").count() > 100 and open_page.broken_images() == []
    assert page.evaluate("[...document.images].every(image => image.alt && image.naturalWidth === 64)")
    for name in (".mark.good", ".mark.bad", ".quiet", "h3", "q", ".word small"):
        seen = page.locator(f"article {name}").first
        seen.scroll_into_view_if_needed()
        open_page.screenshot(tmp_path / "seen.png")
        card = page.locator("article").filter(has=page.locator(name)).first.bounding_box()
        assert card is not None
        back = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"))[
            max(0, int(card["y"])) + 9, int(card["x"]) + 3
        ]
        colour = seen.evaluate("element => getComputedStyle(element).color")
        assert (back.mean() < 60) == dark
        assert contrast([float(part) for part in re.findall(r"[\d.]+", colour)[:3]], back) >= 4.5, (name, colour, back)


def contrast(one: Any, other: Any) -> float:
    """Of two sRGB colours (WCAG 2)."""
    linear = [((np.asarray(colour) / 255 + 0.055) / 1.055) ** 2.4 for colour in (one, other)]
    darker, lighter = sorted(float(colour @ (0.2126, 0.7152, 0.0722)) for colour in linear)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_same_models_give_the_same_page(place: Path, digits: Reference, alone: str) -> None:
    assert gallery.make(digits, place, queries=24) == alone
    assert len(alone) < 3_000_000


def test_captions_are_never_believed(place: Path, open_page: browser.Visit, tmp_path: Path) -> None:
    made = untrained(place, recipe.load("digits_cnn_bigru", [*TINY_MODEL, "data.name=evil"]), "evil")
    html = gallery.make(Reference("<b>evil</b>", made.checkpoint, made.run), place, queries=8, asked=[EVIL])
    seen = read_cards(open_page, html, tmp_path)
    assert seen[0]["title"] == EVIL
    assert any(EVIL in answer["text"] for card in seen for answers in card["lists"] for answer in answers)
    assert open_page.page.title() == "Gallery of <b>evil</b>" and open_page.page.locator("script, b").count() == 0
    assert open_page.errors == [] and open_page.outside == [] and open_page.broken_images() == []
    open_page.page.set_viewport_size({"width": 420, "height": 800})
    assert not open_page.scrolls_sideways()  # words of 240 letters
    open_page.page.set_viewport_size({"width": 1400, "height": 900})
    # This data set knows nothing of what else is true.
    assert "also true" not in html and "the model has never read: " in html


def test_beside_another_model_ranks_before_stand_against_ranks_after(
    place: Path, digits: Reference, open_page: browser.Visit, tmp_path: Path
) -> None:
    other = untrained(place, recipe.load("digits_cnn_bigru", [*TINY_MODEL, "model.set_prediction.num_slots=1"]), "k1")
    html = gallery.make(digits, place, versus=other, queries=40)
    seen = read_cards(open_page, html, tmp_path)
    assert digits.run is not None and other.run is not None
    recorded = [evaluate.ranks(one.run, "digits_extended") for one in (digits, other) if one.run]
    changes = []
    for card in seen:
        kind, query, before, after = re.search(  # type: ignore[union-attr]
            r"(image|caption) (\d+).*rank ([\d,]+) → ([\d,]+) by digits_extended", card["label"] + card["label"]
        ).groups()
        direction = "i2t" if kind == "image" else "t2i"
        expected = [int(one[direction].ranks[one[direction].ids == int(query)][0]) for one in recorded]
        assert [number(after), number(before)] == expected and len(card["lists"]) == 2
        assert min(expected) == 1 < max(expected)
        changes.append((direction, expected[0] > 1, max(expected)))
    for direction in ("i2t", "t2i"):
        for broken in (True, False):
            of_group = [change for *group, change in changes if group == [direction, broken]]
            assert of_group == sorted(of_group, reverse=True) and of_group
    assert [broken for _, broken, _ in changes] == sorted((broken for _, broken, _ in changes), reverse=True)

    alone = gallery.make(other, place, versus=digits, queries=4, worst=True)
    assert "This model has no slots beside each other" in alone and "What each slot sees" not in alone
    assert "Broken: image to text" in alone and "Fixed" not in alone
    evil = untrained(place, recipe.load("digits_cnn_bigru", [*TINY_MODEL, "data.name=evil"]), "other-data")
    with pytest.raises(ConfigError, match="digits-k4 reads data set 'digits' and other-data 'evil'"):
        gallery.make(digits, place, versus=evil)


def test_of_region_features_captions_and_weights_of_regions_are_shown(
    place: Path, open_page: browser.Visit, tmp_path: Path
) -> None:
    overrides = [
        *("data.name=pictures_butd", "model.embed_size=16", "model.image_encoder.feature_dim=5"),
        *("model.text_encoder.word_dim=8", "model.set_prediction.head_dim=4"),
    ]
    reference = untrained(place, recipe.load("coco_butd_bigru", overrides), "regions")
    html = gallery.make(reference, place, queries=8, asked=["caption 1"])
    seen = read_cards(open_page, html, tmp_path)
    assert open_page.errors == [] and open_page.page.locator("img").count() == 0
    assert "features of its regions are there and no pixels" in html
    words = open_page.page.evaluate(
        "[...document.querySelectorAll('article')].filter(card => card.textContent.includes('image 2'))"
        ".map(card => [...card.querySelectorAll('.read > div')][0].querySelectorAll('.word').length)"
    )
    assert 6 in words  # regions of each image
    assert any(
        "caption 0 of image 2" in answer["text"] for card in seen for answers in card["lists"] for answer in answers
    )
    with pytest.raises(ConfigError, match="regions reads region features, which no image file has"):
        gallery.make(reference, place, queries=0, asked=["x.png"])


def test_queries_of_ones_own_come_first_and_are_judged_by_nobody(
    place: Path, digits: Reference, open_page: browser.Visit, tmp_path: Path
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    html = gallery.make(digits, place, queries=0, asked=["a red zebra", str(tmp_path / "x.png")])
    caption, image = read_cards(open_page, html, tmp_path)
    assert caption["title"] == "a red zebra" and "the model has never read: zebra" in caption["label"]
    assert image["title"] == "your image" and "x.png" in image["label"] and str(tmp_path) not in html
    for card in (caption, image):
        assert "rank" not in card["label"].split("never")[0]
        assert [len(answers) for answers in card["lists"]] == [5]
        assert all(answer["mark"] is None for answer in card["lists"][0])
    for query, error, message in (
        (" ", ConfigError, "a query has 0 characters"),
        (str(tmp_path / "none.jpg"), DataError, r"none\.jpg: cannot be read \(No such file"),
        (str(tmp_path / "cut.jpg"), DataError, r"cut\.jpg: the file is empty"),
    ):
        (tmp_path / "cut.jpg").touch()
        with pytest.raises(error, match=message):
            gallery.make(digits, place, queries=0, asked=[query])


def test_the_page_is_kept_with_the_run_and_delivered_after_its_end(place: Path, tiny: Recipe, tmp_path: Path) -> None:
    made = untrained(place, tiny, "published").run
    assert made is not None
    words = ["gallery", "published", "--queries", "4", "--query", "a red three", "--store", str(place)]
    done = CliRunner().invoke(cli.app, [*words, "--to", str(tmp_path / "deep" / "page.html")])
    assert done.exit_code == 0, done.output
    kept = made.folder / "gallery" / "gallery.html"
    assert kept.read_text() == (tmp_path / "deep" / "page.html").read_text() and "a red three" in kept.read_text()
    tracker = Tracker(place)
    listed = tracker.client.list_artifacts(tracker.run_id(made), "gallery")
    assert [artifact.path for artifact in listed] == ["gallery/gallery.html"]

    other = Reference("models:/x@y ..", made.checkpoints / "epoch_0001", made)
    assert gallery.publish("<p>", made, other).name == "gallery-vs-models-x-y.html"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="the page cannot be written there"):
        gallery.write("<p>", tmp_path / "file" / "page.html")
    checkpoint_alone = tmp_path / "moved" / "epoch_0001"
    shutil.copytree(made.checkpoints / "epoch_0001", checkpoint_alone)
    lost = CliRunner().invoke(cli.app, ["gallery", str(checkpoint_alone), "--store", str(place)])
    assert isinstance(lost.exception, ConfigError) and "--to FILE" in str(lost.exception)
