"""Region features prepared: batches are rows of their file, and a file that is exchanged is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from setwise.pipelines import batches, prepare, vocabulary
from setwise.pipelines.batches import Split
from setwise.pipelines.recipe import DataConfig
from setwise.platform.errors import DataError
from tiny import regions_source, run, write_serially


@pytest.fixture(autouse=True)
def _serial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_write_shards", write_serially)


def test_region_features_become_batches_of_their_rows(tmp_path: Path) -> None:
    source = regions_source(tmp_path / "files", bad=(3,))
    base = tmp_path / "data" / source.name
    run(source, base / "prepared", rows_per_shard=8, max_bad_share=0.05)
    prepared = prepare.open_prepared(source.name, tmp_path)
    assert (prepared.kind, prepared.manifest["splits"]["train"]["images"]) == ("regions", 19)
    assert [bad["reason"] for bad in prepared.manifest["quarantine"]] == [
        "the features in row 3 are not finite numbers"
    ]
    assert not list(prepared.folder.glob("*offsets*"))

    words = vocabulary.read(prepared.folder / "vocabulary.json")
    data = DataConfig(crop_scale=(0.3, 1), flip=True, word_drop=0.3)
    for name, times in (("train", 1), ("test", 2)):
        split = Split(prepared, name, data, words)
        features = np.load(tmp_path / "files" / f"{name}_ims.npy", allow_pickle=False)
        places = [place for place in range(0, len(features), times) if np.isfinite(features[place]).all()]
        found = torch.cat([batch.images for batch in batches.in_order(split, 3, threads=2)])
        assert found.dtype == torch.float32 and np.array_equal(found.numpy(), features[places])
        share = next(batches.training_batches(split, 4, seed=1, epoch=1))
        assert share.batch.images.shape == (4, 6, 5) and len(share.batch.lengths) == 8
        assert split.batch([]).images.shape == (0, 6, 5)
        with pytest.raises(DataError, match="there are no images"):
            split.image(0)


def test_features_that_were_exchanged_are_noticed(tmp_path: Path) -> None:
    source = regions_source(tmp_path / "files")
    base = tmp_path / "data" / source.name
    first = run(source, base / "prepared")
    file = tmp_path / "files" / "val_ims.npy"
    np.save(file, np.load(file, allow_pickle=False) + 1)
    with pytest.raises(DataError, match=f"val_ims.npy: is another file now.*prepare {source.name} --from {base}"):
        prepare.open_prepared(source.name, tmp_path)
    assert run(source, base / "prepared").fingerprint != first.fingerprint
    prepare.open_prepared(source.name, tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"val_ims.npy: cannot be read"):
        prepare.open_prepared(source.name, tmp_path)


def test_a_split_has_its_features_in_one_file(tmp_path: Path) -> None:
    source = regions_source(tmp_path / "files")
    moved = replace(source.rows[0], path=tmp_path / "files" / "val_ims.npy")
    with pytest.raises(DataError, match="several files"):
        run(replace(source, rows=[moved, *source.rows[1:]]), tmp_path / "prepared")
