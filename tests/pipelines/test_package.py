"""What a job is sent: the package, whole and alone, and the files that were given."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from setwise.pipelines import package
from setwise.platform import run
from setwise.platform.errors import ConfigError

ROOT = Path(__file__).parents[2]
PROJECT = """
[tool.setuptools]
packages = ["setwise.platform", "setwise.pipelines"]
[tool.setuptools.package-dir]
"setwise.platform" = "platform"
"setwise.pipelines" = "pipelines"
[tool.setuptools.package-data]
"setwise.pipelines" = ["recipes/*.yaml"]
"""


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


def sized(path: Path, mebibytes: float) -> Path:
    """A file of that size that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(int(mebibytes * 2**20))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of a small setwise."""
    root = tmp_path / "checkout"
    for name in ("platform/errors.py", "pipelines/cli.py", "pipelines/recipes/a.yaml", "tests/test_cli.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "pyproject.toml").write_text(PROJECT)
    (root / ".gitignore").write_text("*.pt\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    return root


def test_of_a_checkout_only_tracked_files_of_the_package_are_sent(tree: Path) -> None:
    sized(tree / "pipelines/weights.pt", 150)
    sized(tree / "pipelines/recipes/large.yaml", 150)
    (tree / "pipelines/scratch.py").write_text("# new\n")
    found = package.of_setwise(tree)
    names = ["setwise/pipelines/cli.py", "setwise/pipelines/recipes/a.yaml", "setwise/platform/errors.py"]
    assert sorted(found.files) == names
    assert found.left_out == ["pipelines/recipes/large.yaml", "pipelines/scratch.py"]
    assert found.size < 200


def test_a_file_that_git_tracks_and_that_was_deleted_is_not_missed(tree: Path) -> None:
    (tree / "platform/errors.py").unlink()
    assert "setwise/platform/errors.py" not in package.of_setwise(tree).files


def test_of_this_checkout_every_module_recipe_and_page_is_sent_or_named() -> None:
    found = package.of_setwise()
    patterns = ("*.py", "*.yaml", "gates/*.yaml", "pages/*.html", "presets/*.yaml", "recipes/*.yaml")
    folders = ("platform", "models", "pipelines", "sweeps")
    every = {path for folder in folders for pattern in patterns for path in (ROOT / folder).glob(pattern)}
    assert {path.relative_to(ROOT).as_posix() for path in every} == set(found.left_out) | {
        name.removeprefix("setwise/") for name in found.files
    }


def test_an_installed_setwise_is_sent_from_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "setwise-9.dist-info"
    (tmp_path / "setwise/platform/__pycache__").mkdir(parents=True)
    about.mkdir()
    listed = ["setwise/platform/errors.py", "setwise/platform/__pycache__/errors.cpython-311.pyc"]
    for name in listed:
        (tmp_path / name).write_text("# installed\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: setwise\nVersion: 9\n")
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in [*listed, "../../bin/setwise"]))
    monkeypatch.syspath_prepend(tmp_path)
    assert package.of_setwise(tmp_path).files == {listed[0]: tmp_path / listed[0]}


def test_the_zip_runs_by_itself_and_is_the_same_for_the_same_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    (tmp_path / "mine.yaml").write_text("extends: digits_cnn_bigru\n")
    sent = package.collect([Path("mine.yaml")], tmp_path, say=lambda message: None)
    # What git does not track yet would be missing here as it is on a cluster.
    whole = {**sent.files, **{f"setwise/{name}": ROOT / name for name in sent.left_out}}
    for archive in (first, second):
        package.Package(whole).write(archive)
    assert first.read_bytes() == second.read_bytes()
    job = tmp_path / "job"
    zipfile.ZipFile(first).extractall(job)
    code = (
        "import importlib.metadata, setwise.pipelines.recipe as recipe; "
        "print(recipe.__file__, recipe.load('mine.yaml').data.name, importlib.metadata.version('setwise'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=job, env={"PYTHONPATH": str(job)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(job / "setwise/pipelines/recipe.py"), "digits", "0.1.0"]


def commit(folder: Path) -> str:
    """Commit what is added; its name."""
    git(
        folder,
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@example.org",
        "-c",
        "commit.gpgsign=false",
        "commit",
        "-qm",
        "x",
    )
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("change", [b"", b"# caf\xe9 and caf\xc3\xa9\n", b"x = 1\n" * 400_000])
def test_a_job_knows_of_its_code_what_its_sender_knew(tree: Path, tmp_path: Path, change: bytes) -> None:
    name = commit(tree)
    (tree / "platform/errors.py").write_bytes((tree / "platform/errors.py").read_bytes() + change)
    state, difference = run.code_state(tree / "platform")
    package.of_setwise(tree).write(tmp_path / "sent.zip")
    job = tree / "job"  # even where another checkout is around it
    zipfile.ZipFile(tmp_path / "sent.zip").extractall(job)
    assert run.code_state(job / "setwise" / "platform") == (state, difference)
    assert (state["commit"], state["dirty"]) == (name, bool(change))
    assert len(difference) == min(state["diff_bytes"], run.MAX_DIFF_BYTES)
    assert change[:5] in difference


def test_the_code_of_an_image_is_what_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for built_from, known in (("", (None, None)), ("a1b2", ("a1b2", False)), ("a1b2-dirty", ("a1b2", True))):
        monkeypatch.setenv(run.BUILT_FROM, built_from)
        assert run.code_state(tmp_path) == (dict(zip(("commit", "dirty"), known, strict=True)), b"")


def test_the_checkout_of_somebody_else_is_not_taken_for_ours(tree: Path) -> None:
    """A virtual environment often lies in one."""
    commit(tree)
    installed = tree / ".venv/lib/setwise/platform"
    installed.mkdir(parents=True)
    (installed / "run.py").touch()
    assert run.code_state(installed) == ({"commit": None, "dirty": None}, b"")


def test_over_the_limit_the_five_largest_are_named(tmp_path: Path) -> None:
    for number in range(7):
        sized(tmp_path / f"data/part{number}.bin", 20 + number)
    with pytest.raises(ConfigError) as refused:
        package.collect([Path("data")], tmp_path, say=lambda message: None)
    lines = str(refused.value).splitlines()
    assert "162 MiB would be sent, and 100 are allowed" in lines[0]
    assert [line.split()[-1] for line in lines[1:]] == [f"data/part{number}.bin" for number in (6, 5, 4, 3, 2)]


def test_what_was_given_is_sent_under_its_own_path(tree: Path) -> None:
    (tree / "new.yaml").write_text("a: 1\n")
    (tree / "tests/scratch.bin").write_text("untracked\n")
    given = [Path("new.yaml"), Path("tests"), tree / "platform/errors.py"]
    sent = package.collect(given, tree, say=lambda message: None)
    own = {name: path for name, path in sent.files.items() if not name.startswith("setwise/")}
    assert sorted(own) == ["new.yaml", "platform/errors.py", "tests/test_cli.py"]
    assert own["tests/test_cli.py"].read_text() == "# tests/test_cli.py\n"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("gone.yaml", "there is no such file"),
        ("../outside.yaml", "only files below this folder"),
        ("empty", "nothing to send"),
        ("setwise/x.py", "the package's own"),
    ],
)
def test_what_cannot_be_sent_is_refused(tmp_path: Path, given: str, reason: str) -> None:
    here = tmp_path / "here"
    (here / "empty").mkdir(parents=True)
    (here / "setwise").mkdir()
    (here / "setwise/x.py").touch()
    (tmp_path / "outside.yaml").touch()
    with pytest.raises(ConfigError, match=reason):
        package.collect([Path(given)], here, say=lambda message: None)
