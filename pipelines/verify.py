"""`setwise data verify`: what is wrong with a data set, before any GPU time is spent on it.

Files are checked as their publishers ship them; or, where no source is given, what was prepared of them. A finding is
an error where numbers would not mean what they seem to: another split, test images that cannot be read, ids that belong
to something else. In memory are the rows, and of images and features a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from setwise.pipelines import coco_captions, content_checks, datasets, identity, positives, prepare, shards
from setwise.pipelines.datasets import Caption, Row, SourceConfig, listed
from setwise.pipelines.findings import Finding, Report
from setwise.platform import storage
from setwise.platform.errors import DataError

Say = Callable[[str], None]
LICENCES = {
    "COCO": "COCO's annotations are under CC BY 4.0. Its images are other people's, from Flickr, whose terms of use "
    "bind whoever uses them. ECCV Caption's ground truth is under MIT; CxC, part of it, under Apache 2.0.",
    "Flickr30K": "Flickr30K's images are other people's, from Flickr, whose terms of use bind whoever uses them; its "
    "publishers give them to researchers and educators, for non-commercial purposes.",
}
"""What the publishers say of what may be done with their data."""


def verify(name: str, source: SourceConfig | None, store: Path, *, deep: bool, say: Say) -> Report:
    """Check data set `name`: the files of `source`, or what was prepared in `store` if that is None.

    Args:
        deep: decode every image and read every feature, instead of all headers and a sample.

    Raises:
        ConfigError: `name` cannot be one, or no folder is given.
        DataError: nothing was prepared, or so damaged that it cannot be opened.
    """
    prepare.check_name(name)
    if source is None:
        findings, rows = _prepared(name, store, deep, say)
    else:
        try:
            findings, rows = _files(name, source, deep, say)
        except DataError as error:
            return Report(name, (Finding("error", str(error), str(source.folder), "correct it, and verify again"),), {})
    counts = _counts(rows)
    findings += _against_published(name, counts)
    findings += _captions(rows)
    if datasets.is_coco(name):
        findings += _coco_ids([row for row in rows if row.split == "test"])
    findings += _licence(name)
    order = ("error", "warning", "information")
    return Report(name, tuple(sorted(findings, key=lambda finding: order.index(finding.severity))), counts)


def _files(name: str, config: SourceConfig, deep: bool, say: Say) -> tuple[list[Finding], Sequence[Row]]:
    say(f"reading the files of '{name}'")
    source = datasets.open_source(name, config)
    findings = [Finding("information", note) for note in source.notes]
    if source.quarantine:
        bad = [f"{entry['path']}: {entry['reason']}" for entry in source.quarantine]
        findings.append(
            Finding(
                "warning",
                f"{len(bad):,} lines or images cannot be used",
                listed(bad, "; "),
                "correct them, or go without: preparation leaves them out",
            )
        )
    if source.kind == "images":
        findings += content_checks.check_images(source.rows, deep, say)
    else:
        findings += content_checks.check_features(source.rows, deep, say)
    return findings, source.rows


def _prepared(name: str, store: Path, deep: bool, say: Say) -> tuple[list[Finding], Sequence[Row]]:
    """Shards against the manifest that was written with them, and the features that they point to."""
    prepared = prepare.open_prepared(name, store)
    manifest = prepared.manifest
    files = [
        (prepared.folder / file, digest)
        for split in manifest["splits"].values()
        for shard in split["shards"]
        for file, digest in _digests(shard)
    ]
    progress = content_checks.Progress(say, "files of shards", len(files))
    damaged = []
    for number, (path, digest) in enumerate(files):
        if not path.is_file() or storage.sha256(path) != digest:
            damaged.append(path)
        progress.at(number)
    again = prepare.command(name, manifest["source"]["folder"])
    if damaged:
        raise DataError(
            f"{len(damaged):,} files are missing, or are not as they were written: {listed(damaged)}. Make them again: "
            f"remove {prepared.folder} and {again}"
        )
    if identity.of_prepared(prepared.folder, manifest["splits"], manifest["features"]) != prepared.fingerprint:
        raise DataError(
            f"{prepared.folder}: manifest.json, vocabulary.json or extended_positives are not as they were written. "
            f"Make them again: remove {prepared.folder} and {again}"
        )
    findings = [Finding("information", f"all {len(files):,} files of shards are as they were written")]
    if manifest["quarantine"]:
        bad = [f"{entry['path']}: {entry['reason']}" for entry in manifest["quarantine"]]
        findings.append(Finding("warning", f"{len(bad):,} images or captions were left out", listed(bad, "; ")))
    rows = list(_prepared_rows(prepared.folder, manifest))
    if prepared.kind == "regions":
        findings += content_checks.check_features(rows, deep, say)
    return findings, rows


def _digests(shard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield shard["file"], shard["sha256"]
    if shard["offsets_sha256"] is not None:
        yield f"{Path(shard['file']).stem}.offsets.npy", shard["offsets_sha256"]


def _prepared_rows(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Row]:
    columns = ["image_id", "caption_ids", "captions", *(["place"] if manifest["features"] else [])]
    for split, described in manifest["splits"].items():
        for shard in described["shards"]:
            path = folder / shard["file"]
            if split in manifest["features"]:
                path = Path(manifest["features"][split]["file"])
            for row in shards.read(folder, {"shards": [shard]}, tuple(columns)).to_pylist():
                captions = map(Caption, row["caption_ids"], row["captions"])
                yield Row(row["image_id"], split, path, tuple(captions), row.get("place"))


def _counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    counts = {}
    for split in datasets.SPLITS:
        own = [row for row in rows if row.split == split]
        if own:
            counts[split] = {"images": len(own), "captions": sum(len(row.captions) for row in own)}
    return counts


def _against_published(name: str, counts: dict[str, dict[str, int]]) -> list[Finding]:
    """Differences from the numbers of images and captions that everybody has."""
    known_as = name if name in datasets.PUBLISHED else "coco" if datasets.is_coco(name) else "f30k"
    is_benchmark = datasets.is_coco(name) or datasets.is_flickr30k(name)
    if not is_benchmark and name not in datasets.PUBLISHED:
        return []
    published = datasets.PUBLISHED[known_as]
    findings = []
    for split, images in (("train", published.train), ("val", published.val), ("test", published.test)):
        expected = {"images": images, "captions": images * published.captions}
        found = counts.get(split, {"images": 0, "captions": 0})
        if found != expected:
            findings.append(
                Finding(
                    "error" if is_benchmark else "information",
                    f"{split} has {found['images']:,} images and {found['captions']:,} captions; everybody's has "
                    f"{expected['images']:,} and {expected['captions']:,}",
                    "",
                    "numbers would not compare with the papers'. Get the files that are missing, or choose a name of "
                    "your own"
                    if is_benchmark
                    else "",
                )
            )
    return findings


def _captions(rows: Sequence[Row]) -> list[Finding]:
    """Captions that are none, and captions of val and test that are captions of training images too."""
    findings = []
    bad = [
        f"caption {caption.caption_id} of image {row.image_id} ({row.split}): {reason}"
        for row in rows
        for caption in row.captions
        if (reason := shards.caption_problem(caption.text))
    ]
    if bad:
        findings.append(
            Finding(
                "warning",
                f"{len(bad):,} captions cannot be used",
                listed(bad, "; "),
                "correct them, or go without: preparation leaves them out",
            )
        )
    trained = {hash(_words(caption.text)) for row in rows if row.split == "train" for caption in row.captions}
    for split in ("val", "test"):
        texts = [_words(caption.text) for row in rows if row.split == split for caption in row.captions]
        if leaked := sum(hash(text) in trained for text in texts):
            what = f"{leaked:,} of {len(texts):,} captions of {split} are captions of training images too, word by word"
            findings.append(Finding("information", what))
    return findings


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _coco_ids(rows: list[Row]) -> list[Finding]:
    """Whether the test split has the ids, and the order, that ECCV Caption, CxC and the folds of COCO 1K stand on."""
    order = {caption_id: place for place, caption_id in enumerate(coco_captions.packaged_test_ids())}
    own = [(caption.caption_id, row.image_id) for row in rows for caption in row.captions]
    known = [(caption_id, image_id) for caption_id, image_id in own if caption_id in order]
    image_of = storage.read_json(positives.package_data() / positives.TEST_CAPTIONS)
    strangers = [str(caption_id) for caption_id, image_id in known if image_of[str(caption_id)][0] != image_id]
    places = [order[caption_id] for caption_id, _ in known]
    if strangers:
        return [
            Finding(
                "error",
                f"{len(strangers):,} test captions have ids that COCO gave to captions of other images",
                f"caption ids {listed(strangers)}",
                "ECCV Caption and CxC would be nonsense. Where do the ids come from?",
            )
        ]
    if places != sorted(places):
        return [
            Finding(
                "error",
                "the test captions are not in the order of coco_test_ids.npy",
                "",
                "the folds of COCO 1K depend on it. Take the order of the Karpathy split",
            )
        ]
    if not known:
        return [
            Finding("warning", "no test caption has an id of COCO's", "", "without them, eccv and cxc are not possible")
        ]
    images = len({image_id for _, image_id in known})
    what = f"{images:,} of COCO's 5,000 test images and {len(known):,} of {len(order):,} captions are there, in order"
    if len(known) == len(order):
        return [Finding("information", what)]
    return [Finding("warning", what, "", "with all of them, coco_1k, coco_5k, eccv and cxc are the papers' benchmarks")]


def _licence(name: str) -> list[Finding]:
    whose = "COCO" if datasets.is_coco(name) else "Flickr30K" if datasets.is_flickr30k(name) else None
    if whose is None:
        return []
    return [Finding("information", f"{LICENCES[whose]} This is what they say, and no legal advice.")]
