"""Attacks, made for real: files that would run code, names that lead elsewhere, and ports.

Secrets are in test_secrets.py; what else is attacked where, the Security section of deploy/README.md names.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from promotions import NAME, made, tracker
from setwise.models.config import BertConfig
from setwise.models.text_encoders import Bert
from setwise.pipelines import (
    cli,
    datasets,
    doctor,
    feature_files,
    prepare,
    references,
    registry,
    shards,
    text_weights,
    trained_model,
    vocabulary,
    word_pieces,
)
from setwise.pipelines.datasets import SourceConfig
from setwise.platform import checkpoint, run, storage
from setwise.platform.errors import ConfigError, DataError, SetwiseError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from tiny import images_source, write_serially
from tiny import run as prepare_tiny

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("platform", "models", "pipelines", "sweeps")
SECRET = "canary-0123456789abcdef"
LAST_AFFECTED = {
    "ray": "2.55.1",  # CVE-2026-57516; before it CVE-2026-41486, -27482, CVE-2025-62593, CVE-2023-48022
    "mlflow": "3.16.0",  # CVE-2026-115886; before it CVE-2026-2652, -0545, -4137, CVE-2025-14279
    "torch": "2.10.0",  # CVE-2026-4538; before it CVE-2026-24747, CVE-2025-32434
    "pillow": "12.2.0",  # CVE-2026-40192, -42311
    "transformers": "5.2.0",  # CVE-2026-5241
    "pyarrow": "14.0.0",  # CVE-2023-47248
}
"""The newest version of a package that is known to let a file or a stranger run code here."""


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file of a canary: it is never there."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.is_file(), "the payload works"
    path.unlink()
    return path


# --- files that would run code ------------------------------------------------------------------------------------


def as_pickle(path: Path, canary: Canary) -> None:
    path.write_bytes(pickle.dumps(canary))


def as_torch(path: Path, canary: Canary) -> None:
    torch.save({"weight": canary}, path)


def as_npy(path: Path, canary: Canary) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.array([canary], dtype=object), allow_pickle=True)


def as_npz(path: Path, canary: Canary) -> None:
    with path.open("wb") as stream:
        np.savez(stream, np.array([canary], dtype=object))


FORMS = [as_pickle, as_torch, as_npy, as_npz]
Form = Callable[[Path, Canary], None]


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_a_checkpoint_run_nothing(form: Form, tmp_path: Path, ran: Path) -> None:
    folder = made(tmp_path, "evil", 1.0).checkpoint
    form(folder / checkpoint.WEIGHTS, Canary(ran))
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint.write_manifest(folder)  # whole in itself: it is the one who made it that is evil
    with pytest.raises(DataError, match=r"model\.safetensors"):
        trained_model.load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("form", FORMS)
def test_arrays_and_word_lists_run_nothing(form: Form, tmp_path: Path, ran: Path) -> None:
    form(tmp_path / "x.npy", Canary(ran))
    with pytest.raises(DataError):
        feature_files.open_features(tmp_path / "x.npy")
    with pytest.raises(DataError):
        vocabulary.read(tmp_path / "x.npy")
    with pytest.raises(DataError):
        text_weights.load_word_vectors(tmp_path / "x.npy", ("a",), 3)
    (tmp_path / "vocab.txt").write_bytes((tmp_path / "x.npy").read_bytes())
    with pytest.raises(DataError):
        word_pieces.read(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("form", FORMS)
def test_offsets_of_a_shard_run_nothing(form: Form, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    prepared = prepare_tiny(images_source(tmp_path / "source"), tmp_path / "data")
    split = prepared.manifest["splits"]["train"]
    offsets = next(prepared.folder.glob("train-*.offsets.npy"))
    form(offsets, Canary(ran))
    split["shards"][0]["offsets_sha256"] = storage.sha256(offsets)
    with pytest.raises((DataError, ValueError, KeyError)):
        shards.Jpegs(prepared.folder, split)[0]
    assert not ran.exists()


@pytest.mark.parametrize("name", ["arrow_pickled_object", "arrow_tensor", "arrow_tensor_v2"])
def test_parquet_with_a_type_of_ray_s_own_runs_nothing(name: str, tmp_path: Path, ran: Path) -> None:
    import ray.data

    ray.data.DataContext.get_current()  # from now on Arrow knows Ray's types, and some are pickles
    payload = pickle.dumps(Canary(ran))
    column = pyarrow.array([payload], pyarrow.large_binary())
    marked = pyarrow.field(
        "captions",
        column.type,
        metadata={"ARROW:extension:name": f"ray.data.{name}", "ARROW:extension:metadata": payload},
    )
    file = tmp_path / "captions.parquet"
    images = pyarrow.array(["a.jpg"])
    table = pyarrow.Table.from_arrays([images, column], schema=pyarrow.schema([("image", pyarrow.string()), marked]))
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(DataError):
        datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))
    with pytest.raises(DataError):
        list(shards.captions(tmp_path, {"shards": [{"file": file.name}]}))
    assert not ran.exists()
    if name == "arrow_pickled_object":
        pyarrow.parquet.read_table(file).column("captions")[0].as_py()
        assert ran.exists(), "this is what it is refused for"


def test_a_published_model_s_own_code_is_not_run(tmp_path: Path, ran: Path) -> None:
    import transformers

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    kept = transformers.BertConfig(vocab_size=30, max_position_embeddings=64, **sizes)
    transformers.BertModel(kept).save_pretrained(tmp_path)
    (tmp_path / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "modeling_evil.Evil")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"trust_remote_code": True}))
    ours = BertConfig.model_validate(
        {"kind": "bert", "width": 24, "layers": 1, "heads": 3, "ff_width": 40, "max_tokens": 64}
    )
    text_weights.load_bert(Bert(ours, vocabulary_size=30, embed_size=12), str(tmp_path))
    with pytest.raises(DataError, match="has no vocab"):
        word_pieces.read(str(tmp_path))
    assert not ran.exists()


def test_a_model_that_mlflow_would_run_is_only_looked_at(tmp_path: Path, ran: Path) -> None:
    one = tracker(tmp_path, tmp_path / "mlflow.db")
    folder = tmp_path / "model"
    folder.mkdir()
    flavor = "loader_module: mlflow.pyfunc.model\n    python_model: python_model.pkl"
    (folder / "MLmodel").write_text(f"flavors:\n  python_function:\n    {flavor}\n")
    as_pickle(folder / "python_model.pkl", Canary(ran))
    for file in (*checkpoint.INFERENCE_FILES, checkpoint.TRAINING_STATE):
        as_pickle(folder / file, Canary(ran))
    checkpoint.write_manifest(folder)
    one.client.create_registered_model(NAME)
    tags = {registry.HASH_TAG: storage.sha256(folder / checkpoint.MANIFEST)}
    one.client.create_model_version(NAME, folder.as_uri(), tags=tags)
    one.client.set_registered_model_alias(NAME, registry.CHAMPION, "1")
    champion = references.resolve(f"models:/{NAME}@{registry.CHAMPION}", tmp_path, one)
    with pytest.raises((DataError, ValueError)):
        trained_model.load(champion.checkpoint)
    assert doctor.examine(tmp_path, one) and not ran.exists()


def test_no_module_unpacks_an_archive() -> None:
    """So there is no member of one that could lead elsewhere, and no bomb; zips are written, for jobs, and gzip is read
    line by line."""
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if "tarfile" in names or called in ("extractall", "unpack_archive"):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


# --- names that lead elsewhere ------------------------------------------------------------------------------------


def test_no_name_leads_out_of_the_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    one = tracker(store, store / "mlflow.db")
    made(store, "good", 1.0)
    before = sorted(tmp_path.rglob("*"))
    for name in ("../evil", "/evil", "a/../../evil", "a\x00b", "a\N{DIVISION SLASH}b", "x" * 200, ""):
        with pytest.raises(ConfigError, match="cannot name a run"):
            run.create(store / "runs", name, "a: 1\n", "e")
        with pytest.raises(ConfigError):
            prepare.open_prepared(name, store)
        for reference in (f"models:/{name}/1", f"models:/{name}@champion", f"best:{name}"):
            with pytest.raises(SetwiseError):
                references.resolve(reference, store, one)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("named", ["../../other/checkpoints/epoch_0001", "{}/other/checkpoints/epoch_0001"])
def test_the_best_of_a_run_is_one_of_its_own(named: str, tmp_path: Path) -> None:
    one, other = made(tmp_path, "one", 1.0).run, made(tmp_path, "other", 1.0).run
    assert one is not None and other is not None and other.best_checkpoint()
    storage.write_json(one.folder / "best.json", {"checkpoint": named.format(tmp_path / "runs"), "value": 1.0})
    with pytest.raises(DataError, match="no checkpoint of this run"):
        one.best_checkpoint()


def test_a_run_of_somebody_else_takes_no_files_of_ours_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = tracker(tmp_path, tmp_path / "mlflow.db")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text(SECRET)
    theirs = Run(tmp_path / "runs" / "theirs")
    storage.write_json(theirs.folder / "run.json", {"experiment": "e", "parent": None})
    (theirs.folder / "page.html").write_text("a page")
    (theirs.folder / "gallery").mkdir()
    (theirs.folder / "gallery" / "picture.html").symlink_to(tmp_path / "private" / "key")
    named = ["../../private/key", str(tmp_path / "private"), "gallery", "page.html"]
    Outbox(theirs.events).append(*({"kind": "artifact", "path": path, "into": ""} for path in named))
    assert one.deliver(theirs) == len(named)
    listed = one.client.list_artifacts(one.run_id(theirs))
    assert [file.path for file in listed] == ["page.html"]
    assert caplog.text.count("leads out of the run") == 3
    assert not [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file() and SECRET in path.read_text()]


@pytest.mark.parametrize("name", ["x' OR name LIKE '%", 'x" OR "1"="1', "x` OR `a"])
def test_a_name_with_quotes_asks_the_registry_nothing_else(name: str, tmp_path: Path) -> None:
    one = tracker(tmp_path, tmp_path / "mlflow.db")
    one.client.create_registered_model(NAME)
    with pytest.raises(ConfigError, match="no registered model is called"):
        registry.full_name(name, one)


def test_a_store_that_every_user_may_change_is_found_by_doctor(tmp_path: Path) -> None:
    one = tracker(tmp_path, tmp_path / "mlflow.db")
    for mode, ok in ((0o700, True), (0o2775, True), (0o777, False), (0o1777, False)):
        tmp_path.chmod(mode)
        (check,) = [check for check in doctor.examine(tmp_path, one) if check.name == "store"]
        assert check.ok is ok or "GB free" in check.found
        assert ("every user" in check.found) is not ok
    tmp_path.chmod(0o700)


# --- ports --------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_cluster_of_our_own_listens_on_loopback_alone_and_its_token_is_private(tmp_path: Path) -> None:
    code = """
import json, ray, psutil
from setwise.platform import cluster

with cluster.connect(cpus=1):
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    mine = psutil.Process()
    processes = [mine, *mine.children(recursive=True)]
    found = {process.name(): process.net_connections(kind="inet") for process in processes}
    heard = sorted({one.laddr.ip for all in found.values() for one in all if one.status == "LISTEN"})
    print(json.dumps([sorted(found), heard, [process.cmdline() for process in processes]]))
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    names, heard, typed = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= set(names)
    assert {address.removeprefix("::ffff:") for address in heard} == {"127.0.0.1"}
    file = tmp_path / ".ray" / "auth_token"
    assert file.stat().st_mode & 0o077 == 0 and len(file.read_text()) == 64
    assert file.read_text() not in done.stdout + done.stderr + json.dumps(typed)


def test_pages_are_served_on_loopback_alone_and_no_password_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[str] = []
    monkeypatch.setattr(os, "execv", lambda program, words: typed.extend(words))
    monkeypatch.setattr(cli.results, "file", io.StringIO())
    tracker(tmp_path, tmp_path / "mlflow.db")
    monkeypatch.setenv("SETWISE_OPTUNA_URL", f"postgresql://me:{SECRET}@host/db")
    for variable in ("SETWISE_DASHBOARD_URL", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "")
    for words in (["ui", "--port", "0"], ["sweep", "dashboard", "--port", "0"]):
        typed.clear()
        done = CliRunner().invoke(cli.app, [*words, "--store", str(tmp_path)])
        assert done.exception is None and typed
        line = " ".join(typed)
        assert re.search(r"--host 127\.0\.0\.1 |host='127\.0\.0\.1'", line) and SECRET not in line
    assert os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


# --- versions, and the list itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAST_AFFECTED)
def test_no_version_with_a_known_hole_is_allowed_or_installed(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (wanted,) = [one for line in project["dependencies"] if (one := Requirement(line)).name == name]
    assert not wanted.specifier.contains(LAST_AFFECTED[name]), f"{wanted} allows {LAST_AFFECTED[name]}"
    assert wanted.specifier.contains(version(name))


def test_every_test_that_the_guide_names_is_there() -> None:
    guide = (ROOT / "deploy" / "README.md").read_text("utf-8")
    section = guide.partition("\n## Security\n")[2].partition("\n## ")[0]
    named = re.findall(r"`(test_\w+)`", section)
    known = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(set(named)) > 10 and set(named) <= known
