"""Benchmarks from one pass, against matrices by hand, and protocols that tell comparable numbers from others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from setwise.models.loss_config import SimilarityConfig
from setwise.models.similarity import Similarity
from setwise.pipelines import benchmarks, metrics, positives, protocol, ranking
from setwise.pipelines.benchmarks import Encoded, Kind, Outcome
from setwise.pipelines.ranking import Member
from setwise.platform.errors import DataError

CXC = Path(__file__).parent.parent / "golden" / "cxc"
NOWHERE = Path("nowhere")
PRECISIONS = ("average_precision", "r_precision")


def member(images: int, captions: int, seed: int = 0, **similarity: Any) -> Member:
    """Sets of two elements, of coordinates in coarse steps, so that products are exact and many scores tie."""
    rng = np.random.default_rng(seed)
    sets = [torch.from_numpy(rng.integers(-4, 5, (size, 2, 8)).astype(np.float32) / 16) for size in (images, captions)]
    return Member(sets[0], sets[1], Similarity(SimilarityConfig(**({"kind": "mil"} | similarity))))


def encoded(images: int = 23, seed: int = 0, members: int = 1, **similarity: Any) -> Encoded:
    """Images with 1 to 3 captions each."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), rng.integers(1, 4, images))
    some = tuple(member(images, len(owners), seed + n, **similarity) for n in range(members))
    return Encoded(some, owners, 100 + np.arange(images), 1000 + np.arange(len(owners)))


def scores(split: Encoded) -> NDArray[np.float32]:
    """The matrix that no benchmark makes."""
    with torch.inference_mode():
        each = [one.similarity(one.rows.double(), one.columns.double()).numpy() for one in split.members]
    return np.mean(each, axis=0).astype(np.float32)


def own(split: Encoded) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = split.owners[None, :] == np.arange(len(split.image_ids))[:, None]
    return found


def one(name: str, kind: Kind, split: Encoded, **more: Any) -> Outcome:
    (found,) = benchmarks.measure({name: kind}, split, **({"extended": NOWHERE} | more))
    return found


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_whole_split_is_measured_as_from_its_matrix(seed: int, members: int) -> None:
    split = encoded(seed=seed, members=members)
    measured = one("x", "whole", split)
    assert measured.values == pytest.approx(metrics.retrieval_metrics(scores(split), own(split)), rel=1e-14)
    assert measured.ranks["i2t"].ids.tolist() == split.image_ids.tolist()
    expected = metrics.ranks_of_best_positive(scores(split).T, own(split).T)
    assert measured.ranks["t2i"].ranks.tolist() == expected.tolist()
    assert measured.ranks["t2i"].ranks.dtype == np.int32
    assert measured.ranks["i2t"].images.tolist() == split.image_ids.tolist()
    assert measured.ranks["t2i"].images.tolist() == split.image_ids[split.owners].tolist()
    assert measured.protocol["members"] == members


@pytest.mark.parametrize("seed", range(4))
def test_five_folds_are_consecutive_and_averaged(seed: int) -> None:
    split = encoded(seed=seed)
    each = []
    for start in range(0, 20, 4):  # a fifth of 23 images is 4; three are left out
        rows = list(range(start, start + 4))
        columns = [caption for caption, owner in enumerate(split.owners) if owner in rows]
        inside = np.ix_(rows, columns)
        each.append(metrics.retrieval_metrics(scores(split)[inside], own(split)[inside]))
    measured = one("x_folds", "folds", split)
    assert measured.values == pytest.approx({key: np.mean([fold[key] for fold in each]) for key in each[0]}, rel=1e-14)
    assert (measured.protocol["folds"], measured.protocol["images_per_fold"]) == (5, 4)
    assert measured.ranks["i2t"].ids.tolist() == split.image_ids[:20].tolist()
    assert max(measured.ranks["t2i"].ranks) <= 4
    for direction, found in measured.ranks.items():
        assert found.fold is not None and found.fold.tolist() == ((found.images - 100) // 4).tolist()
        shares = [np.mean(found.ranks[found.fold == number] <= 1) for number in range(5)]
        assert measured.values[f"{direction}_R1"] == pytest.approx(100 * np.mean(shares))


def test_a_fold_has_a_thousand_images_at_most() -> None:
    in_fold, of_caption = benchmarks.folds(5_500, np.repeat(np.arange(5_500), 2))
    assert np.bincount(in_fold).tolist() == [*[1_000] * 5, 500]
    assert of_caption[[0, 1_999, 2_000, 9_999, 10_000]].tolist() == [0, 0, 1, 4, 5]


def test_extended_positives_are_looked_up_by_id(tmp_path: Path) -> None:
    """Only the queries that the files name are asked; what is true and not in the split counts, and is never found."""
    sets = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.7, 0.3]])
    images, captions = sets[:, None, :], torch.eye(3)[:, None, :]
    small = Encoded(
        members=(Member(images, captions, Similarity(SimilarityConfig(kind="mil"))),),
        owners=np.array([0, 1, 1]),
        image_ids=np.array([7, 8]),
        caption_ids=np.array([70, 80, 81]),
    )
    (tmp_path / "image_to_caption.json").write_text(json.dumps({"7": [70, 81, 81, 999], "9": [70]}))
    (tmp_path / "caption_to_image.json").write_text(json.dumps({"80": [8], "81": [7, 8], "70": []}))
    measured = one("x_extended", "extended", small, extended=tmp_path)
    assert measured.values == pytest.approx(
        {
            "i2t_R1": 100,
            "i2t_r_precision": 100 * 2 / 3,  # of three positives the first and, at the third place, another
            "i2t_map_at_r": 100 * (1 + 2 / 3) / 3,
            "t2i_R1": 50,
            "t2i_r_precision": 50,
            "t2i_map_at_r": 50,
        }
    )
    assert measured.protocol["queries"] == {"i2t": 1, "t2i": 2}
    assert measured.protocol["queries_named"] == {"i2t": 2, "t2i": 2}
    assert measured.ranks["t2i"].ids.tolist() == [80, 81]
    assert measured.ranks["t2i"].images.tolist() == [8, 8]
    kept = {end: [getattr(measured.ranks[d], end).tolist() for d in ("i2t", "t2i")] for end in PRECISIONS}
    assert kept == {
        "average_precision": [pytest.approx([(1 + 2 / 3) / 3]), [0, 1]],
        "r_precision": [pytest.approx([2 / 3]), [0, 1]],
    }
    assert measured.ranks["i2t"].r_precision.dtype == np.float32  # type: ignore[union-attr]
    (tmp_path / "image_to_caption.json").write_text('{"7": ["many"]}')
    with pytest.raises(DataError, match=r"image_to_caption\.json: expected"):
        one("x_extended", "extended", small, extended=tmp_path)


def test_damaged_ratings_are_found_before_anything_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CXC, tmp_path / "cxc")
    file = tmp_path / "cxc" / "sits_test.csv.gz"
    file.write_bytes(file.read_bytes()[:-1000])
    monkeypatch.delattr(ranking, "count_ahead")
    with pytest.raises(DataError, match=r"sits_test\.csv\.gz: damaged, or cut short"):
        one("cxc", "cxc", coco_part(), cxc=tmp_path / "cxc")


def test_names_are_those_of_the_literature_where_it_has_any() -> None:
    assert benchmarks.names("coco") == benchmarks.names("coco_butd") == ("coco_1k", "coco_5k", "eccv", "cxc")
    assert benchmarks.names("f30k_butd") == ("f30k",)
    assert benchmarks.names("digits") == ("digits_1k", "digits_5k", "digits_extended")
    assert benchmarks.names("my_birds") == ("my_birds", "my_birds_folds", "my_birds_extended")
    assert benchmarks.names("cocoa") == ("cocoa", "cocoa_folds", "cocoa_extended")


def coco_part(images: int = 120) -> Encoded:
    """The first images of COCO's test split with their captions, and random sets in their place."""
    test = np.load(positives.package_data() / "coco_test_ids.npy", allow_pickle=False)[: 5 * images]
    truth = json.loads((positives.package_data() / positives.TEST_CAPTIONS).read_bytes())
    ids = np.array([truth[str(caption)][0] for caption in test[::5]])
    some = (member(images, 5 * images, kind="smooth_chamfer"),)
    return Encoded(some, np.repeat(np.arange(images), 5), ids, test)


def test_coco_benchmarks_take_one_pass_and_cxc_one_more_for_each_side_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = []
    count = ranking.count_ahead

    def counted(members: Any, *arguments: Any, **more: Any) -> Any:
        passes.append((len(members[0].rows), len(members[0].columns)))
        return count(members, *arguments, **more)

    monkeypatch.setattr(ranking, "count_ahead", counted)
    split = coco_part()
    measured = {one.benchmark: one for one in benchmarks.measure(benchmarks.kinds("coco"), split, extended=NOWHERE)}
    assert tuple(measured) == benchmarks.names("coco") and passes == [(120, 600)]
    assert set(measured["cxc"].values) == {f"{d}_R{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)}
    whole = one("cxc", "cxc", split, cxc=CXC)
    assert passes == [(120, 600), (120, 600), (600, 600), (120, 120)]
    assert {name: whole.values[name] for name in measured["cxc"].values} == measured["cxc"].values
    assert set(whole.ranks) == {"i2t", "t2i", "t2t", "i2i"}
    image_of = dict(zip(split.caption_ids.tolist(), split.image_ids[split.owners].tolist(), strict=True))
    assert whole.ranks["t2t"].images.tolist() == [image_of[one] for one in whole.ranks["t2t"].ids.tolist()]
    assert whole.ranks["i2i"].images.tolist() == whole.ranks["i2i"].ids.tolist()
    assert {"t2t_R1", "i2i_R10", "sts_spearman", "sis_spearman_std", "sits_spearman"} <= set(whole.values)
    differences = protocol.describe_difference(measured["cxc"].protocol, whole.protocol)
    assert any(difference.startswith("truth.sts: - | ") for difference in differences)
    queries, named = measured["eccv"].protocol["queries"], measured["eccv"].protocol["queries_named"]
    assert named == {"i2t": 1261, "t2i": 1332} and 0 < queries["i2t"] < 120


def test_a_side_by_itself_is_ranked_as_from_its_matrix_without_its_diagonal() -> None:
    """Chamfer of sets in coarse steps: many scores tie, and an item may be closer to another than to itself."""
    split = replace(coco_part(), members=(member(120, 600, kind="chamfer"),))
    measured = one("cxc", "cxc", split, cxc=CXC)
    own_image = split.owners[:, None] == split.owners[None, :]
    from setwise.pipelines import crisscrossed

    ratings = crisscrossed.read(CXC)
    true = np.zeros((600, 600), dtype=bool)
    for first, second, rating in zip(ratings["sts"].first, ratings["sts"].second, ratings["sts"].rating, strict=True):
        if rating >= 3:
            row, column = np.flatnonzero(split.caption_ids == first), np.flatnonzero(split.caption_ids == second)
            if len(row) and len(column):
                true[row[0], column[0]] = true[column[0], row[0]] = True
    off = ~np.eye(600, dtype=bool)
    true = (true | own_image) & off
    captions = split.members[0].columns
    table = split.members[0].similarity(captions, captions).numpy()
    ranks = metrics.ranks_of_best_positive(table[off].reshape(600, 599), true[off].reshape(600, 599))
    assert measured.ranks["t2t"].ranks.tolist() == ranks.tolist()
    assert measured.values["t2t_R5"] == pytest.approx(100 * np.mean(ranks <= 5))


def test_what_cannot_be_measured_is_named_with_its_reason(tmp_path: Path) -> None:
    def reasons(split: Encoded, dataset: str) -> dict[str, str]:
        wanted = benchmarks.kinds(dataset)
        return benchmarks.unavailable(wanted, split.image_ids, split.caption_ids, split.owners, tmp_path / "none")

    split = coco_part(30)
    assert reasons(split, "coco") == {}
    assert reasons(split, "birds") == {"birds_extended": "the data set has no extended positives"}
    few = encoded(4)
    assert reasons(few, "birds")["birds_folds"] == "4 images do not make 5 folds"
    far = replace(few, caption_ids=few.caption_ids + 10**7)
    assert "no caption has an id of COCO's test split" in reasons(far, "coco")["eccv"]
    moved = replace(split, image_ids=np.roll(split.image_ids, 1))
    assert set(reasons(moved, "coco")) == {"eccv", "cxc"}
    assert "caption id 770337 belongs to image 391895 in COCO" in reasons(moved, "coco_butd")["cxc"]


def test_a_protocol_changes_with_all_that_makes_numbers_incomparable_and_with_nothing_else() -> None:
    base = encoded(kind="smooth_chamfer", alpha=16)
    fingerprint = one("x", "whole", base).fingerprint
    other_weights = replace(base, members=encoded(seed=0, members=2, kind="smooth_chamfer", alpha=16).members[1:])
    assert one("x", "whole", other_weights).fingerprint == fingerprint
    owners = np.minimum(base.owners, 21)  # the last image's captions are given to the one before
    sharper = tuple(Member(m.rows, m.columns, Similarity(SimilarityConfig(alpha=8))) for m in base.members)
    differences = {
        "ids": [
            replace(base, image_ids=base.image_ids + 1),
            replace(base, caption_ids=base.caption_ids + 1),
            replace(base, owners=owners),
        ],
        "similarity.alpha": [replace(base, members=sharper)],
        "members": [replace(base, members=base.members * 2)],
    }
    for field, others in differences.items():
        for other in others:
            found = protocol.describe_difference(base.protocol("pessimistic"), other.protocol("pessimistic"))
            assert any(difference.startswith(f"{field}: ") for difference in found), found
    assert one("x", "whole", base, ties="official").fingerprint != fingerprint
    assert one("x_folds", "folds", base).fingerprint != fingerprint
    assert one("x", "whole", replace(base, members=sharper)).task == one("x", "whole", base).task


def test_a_learned_similarity_is_described_with_what_it_learned() -> None:
    learned = Similarity(SimilarityConfig(kind="match_probability"))
    torch.nn.init.constant_(learned.shift, -0.5)
    assert protocol.of_similarity(learned) == {"kind": "match_probability", "scale": 1.0, "shift": -0.5}
    assert protocol.of_similarity(Similarity(SimilarityConfig(kind="mil", alpha=3))) == {"kind": "mil"}


def test_a_protocol_is_told_in_words() -> None:
    found = one("x_folds", "folds", encoded(kind="smooth_chamfer", alpha=16), ties="official")
    assert protocol.in_words(found.protocol) == (
        "5 folds of 4 images; own captions; of equal scores the later index is ahead, as in the authors' code; "
        "smooth_chamfer alpha 16"
    )
    part = one("eccv", "eccv", coco_part())
    assert (
        "120 images, 600 captions; ECCV Caption; queries i2t 35 of 1,261, t2i 35 of 1,332; ties "
        in protocol.in_words(part.protocol)
    )


def test_a_diverged_model_is_not_ranked() -> None:
    split = encoded()
    split.members[0].columns[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        one("x", "whole", split)
