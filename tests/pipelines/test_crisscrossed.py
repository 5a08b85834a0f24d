"""Crisscrossed Captions: the real ratings, positives by hand, and correlations against scipy."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from setwise.pipelines import crisscrossed, positives
from setwise.pipelines.crisscrossed import Rated
from setwise.platform import storage
from setwise.platform.errors import DataError

CXC = Path(__file__).parent.parent / "golden" / "cxc"


@pytest.fixture(scope="module")
def ratings() -> dict[str, Rated]:
    return crisscrossed.read(CXC)


def test_ratings_of_three_or_more_are_exactly_the_pairs_of_eccv_captions_package(ratings: dict[str, Rated]) -> None:
    sits = ratings["sits"]
    high = sits.rating >= crisscrossed.TEXT_THRESHOLD
    rated = set(zip(sits.first[high].tolist(), sits.second[high].tolist(), strict=True))
    truth = json.loads((positives.package_data() / "cxc_caption_to_image.json").read_bytes())
    assert rated == {(int(caption), image) for caption, images in truth.items() for image in images}
    assert len(rated) == 35_585


def test_all_that_was_rated_is_of_the_test_split(ratings: dict[str, Rated]) -> None:
    truth = json.loads((positives.package_data() / positives.TEST_CAPTIONS).read_bytes())
    captions = {int(caption) for caption in truth}
    images = {image for images in truth.values() for image in images}
    assert {*ratings["sts"].first.tolist(), *ratings["sts"].second.tolist()} == captions
    assert {*ratings["sis"].first.tolist(), *ratings["sis"].second.tolist()} == images
    assert [len(one.rating) for one in ratings.values()] == [44_045, 46_719, 44_833]


def pairs(found: positives.Positives) -> set[tuple[int, int]]:
    return set(zip(found.query.tolist(), found.item.tolist(), strict=True))


def test_captions_are_true_of_the_captions_of_their_image_and_of_those_rated_so() -> None:
    sts = Rated(np.array([10, 13, 14, 10, 99]), np.array([13, 12, 11, 14, 10]), np.array([3.0, 5.0, 2.99, 4.0, 5.0]))
    found = crisscrossed.text_positives(sts, np.array([10, 11, 12, 13, 14]), np.array([0, 0, 1, 2, 2]))
    own = {(0, 1), (1, 0), (3, 4), (4, 3)}
    assert pairs(found) == own | {(0, 3), (3, 0), (3, 2), (2, 3), (0, 4), (4, 0)}
    assert found.rows.tolist() == [0, 1, 2, 3, 4] and found.relevant.tolist() == [3, 1, 1, 3, 2]


def test_images_are_true_of_images_rated_so_and_an_image_without_any_is_not_asked() -> None:
    sis = Rated(np.array([7, 9, 8, 7]), np.array([8, 7, 7, 7]), np.array([2.5, 2.4, 1.0, 5.0]))
    found = crisscrossed.image_positives(sis, np.array([9, 8, 7]))
    assert pairs(found) == {(1, 2), (2, 1)}, "either rating of a pair is enough, and an image is no positive of itself"
    assert found.rows.tolist() == [1, 2]


def test_the_correlation_is_spearmans_over_draws_of_half_the_queries_with_a_partner_each() -> None:
    """With one partner a query, a draw is a half of the pairs."""
    rng = np.random.default_rng(0)
    rating = rng.integers(0, 11, 400) / 2
    similarity = rating + rng.normal(0, 1.5, 400)
    found = crisscrossed.correlation(rng.permutation(400), similarity, rating)
    assert found is not None
    halves = [stats.spearmanr(similarity[half], rating[half]).statistic for half in _halves(400)]
    assert found[0] == pytest.approx(100 * np.mean(halves), abs=100 * 4 * np.std(halves) / np.sqrt(1000))
    assert found[1] == pytest.approx(100 * np.std(halves), rel=0.15)


def _halves(size: int) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    rng = np.random.default_rng(1)
    return [rng.permutation(size)[: size // 2] for _ in range(1000)]


def test_ranks_of_a_draw_are_those_of_sorting() -> None:
    levels = np.random.default_rng(0).integers(0, 9, 50)
    assert crisscrossed._ranks(levels).tolist() == stats.rankdata(levels).tolist()


def test_a_query_with_many_partners_weighs_no_more_than_another() -> None:
    """One query has 300 pairs, rated against the similarity; it is at most one pair of a draw."""
    query = np.concatenate([np.arange(40), np.full(300, 40)])
    rating = np.concatenate([np.linspace(0, 5, 40), np.linspace(0, 5, 300)])
    similarity = np.concatenate([np.arange(40.0), np.linspace(40, -1, 300)])
    found = crisscrossed.correlation(query, similarity, rating)
    assert found is not None and found[0] > 90
    assert stats.spearmanr(similarity, rating).statistic < -0.5


def test_a_correlation_is_drawn_alike_each_time_and_ends_where_it_says_nothing() -> None:
    rng = np.random.default_rng(0)
    query, rating, similarity = rng.integers(0, 50, 200), rng.random(200) * 5, rng.random(200)
    assert crisscrossed.correlation(query, similarity, rating) == crisscrossed.correlation(query, similarity, rating)
    perfect = crisscrossed.correlation(query, rating**3, rating)
    assert perfect == (pytest.approx(100), pytest.approx(0))
    assert crisscrossed.correlation(query, np.ones(200), rating) == (0, 0)
    assert crisscrossed.correlation(query % 19, similarity, rating) is None


def edited(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Writes sts_test.csv, changed, in the place of the gzipped file."""

    def apply(folder: Path) -> None:
        data = gzip.decompress((folder / "sts_test.csv.gz").read_bytes())
        (folder / "sts_test.csv.gz").unlink()
        (folder / "sts_test.csv").write_bytes(change(data))

    return apply


def line(number: int, text: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        lines = data.split(b"\n")
        lines[number - 1] = text
        return b"\n".join(lines)

    return change


GOOD = b"COCO_val2014:sentid:10,COCO_val2014:sentid:11,"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "sis_test.csv.gz").unlink(), "neither sis_test.csv nor sis_test.csv.gz is there"),
        (lambda folder: (folder / "sts_test.csv.gz").write_bytes(b"\x1f\x8b\x08"), "sts_test.csv.gz: damaged"),
        (
            lambda folder: (folder / "sts_test.csv.gz").write_bytes((CXC / "sts_test.csv.gz").read_bytes()[:-500]),
            "sts_test.csv.gz: damaged, or cut short",
        ),
        (edited(lambda data: data[:-30]), r"sts_test.csv:44046: (not a rating|ends after)"),
        (edited(lambda data: data[: data.rindex(b"\n", 0, -1) + 1]), "44045: ends after 44,044 ratings of 44,045"),
        (edited(line(1, b"a,b,c")), r"sts_test.csv:1: expected the columns caption1, caption2, agg_score"),
        (edited(line(7, GOOD + b"5.1,x")), r"sts_test.csv:7: not a rating \(a rating is 0 to 5, not 5.1\)"),
        (edited(line(8, GOOD + b"nan,x")), r"sts_test.csv:8: not a rating"),
        (edited(line(9, GOOD + b"much,x")), r"sts_test.csv:9: not a rating"),
        (edited(line(10, b"COCO_val2014:sentid:10")), r"sts_test.csv:10: not a rating"),
        (edited(line(11, b"10,11,3.0,x")), r"sts_test.csv:11: not a rating \('10' is not of the form"),
        (edited(line(12, b"\xff\xfe")), "sts_test.csv: damaged"),
        (edited(lambda data: b""), r"sts_test.csv:1: expected the columns"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, damage: Callable[[Path], object], expected: str) -> None:
    shutil.copytree(CXC, tmp_path / "cxc")
    damage(tmp_path / "cxc")
    with pytest.raises(DataError, match=expected):
        crisscrossed.read(tmp_path / "cxc")


def test_files_are_known_again_by_their_content(tmp_path: Path) -> None:
    found = crisscrossed.fingerprints(CXC)
    assert found == {task: storage.sha256(CXC / f"{task}_test.csv.gz")[:16] for task in ("sts", "sis", "sits")}
    with pytest.raises(DataError, match=r"three files: sts_test\.csv, sis_test\.csv, sits_test\.csv"):
        crisscrossed.fingerprints(tmp_path)
