"""What a job is sent: the files of setwise that a wheel would hold, what git knows of them, and the files a user gives,
as one zip.

No wheel itself is sent. Ray knows a wheel by its file name alone, so that changed code of the same version would not
reach a cluster that has seen the name, and it installs wheels with pip and all their dependencies, once a node. A zip
is known by its content, and unpacked.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import tomllib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from setwise.platform import run
from setwise.platform.errors import ConfigError

LIMIT_BYTES = 100 * 2**20
NAMED = 5
EPOCH = (1980, 1, 1, 0, 0, 0)  # a time for all members, so that the same content is the same zip


@dataclass(frozen=True)
class Package:
    """Files by their names in the zip.

    Args:
        left_out: modules that git does not know.
        code: commit of the modules and the difference to it, for the record of what the job trains.
    """

    files: Mapping[str, Path]
    left_out: Sequence[str] = ()
    code: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of all files, before compression."""
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, archive: Path) -> None:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
            for name, path in sorted(self.files.items()):
                stream.writestr(zipfile.ZipInfo(name, EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)
            if self.code:
                stream.writestr(zipfile.ZipInfo(f"setwise/{run.SENT_CODE}", EPOCH), self.code, zipfile.ZIP_DEFLATED)
            version = importlib.metadata.version("setwise")  # for importlib.metadata in the job
            about = f"Metadata-Version: 2.1\nName: setwise\nVersion: {version}\n"
            stream.writestr(zipfile.ZipInfo(f"setwise-{version}.dist-info/METADATA", EPOCH), about)

    def check_size(self) -> None:
        """Raises ConfigError, with the largest files, if it is more than a head should keep in its memory."""
        if self.size <= LIMIT_BYTES:
            return
        largest = sorted(self.files.items(), key=lambda item: item[1].stat().st_size, reverse=True)[:NAMED]
        listed = "\n".join(f"  {path.stat().st_size / 2**20:8.1f} MiB  {name}" for name, path in largest)
        raise ConfigError(
            f"{self.size / 2**20:.0f} MiB would be sent, and {LIMIT_BYTES / 2**20:.0f} are allowed. Put data where "
            f"all nodes read it, and give its path instead. The largest:\n{listed}"
        )


def collect(given: Sequence[Path], here: Path, say: Callable[[str], None]) -> Package:
    """setwise itself and the files a user gives, these under the paths they have below the folder `here`.

    Args:
        given: files, sent in any case, and folders, of which is sent what git tracks, or all outside a checkout.

    Raises:
        ConfigError: a path is not there, lies outside `here`, or hides setwise; or all of it is too large.
    """
    package = of_setwise()
    files = dict(package.files)
    for path in given:
        for file in _files_of(path, here):
            name = _name_below(here, file)
            if name.split("/")[0] == "setwise":
                raise ConfigError(f"--file {path}: the folder 'setwise' of a job is the package's own; rename yours")
            files[name] = file
    if package.left_out:
        say(f"not sent, since git does not track them: {', '.join(package.left_out)}")
    whole = Package(files, package.left_out, package.code)
    whole.check_size()
    return whole


def of_setwise(root: Path | None = None) -> Package:
    """The package alone, from its source tree or from where it is installed.

    Args:
        root: the source tree; None means the one this module lies in, if it lies in one.
    """
    tree = root or Path(__file__).resolve().parent.parent
    found = _from_tree(tree) if (tree / "pyproject.toml").is_file() else _installed()
    return replace(found, code=run.describe_code(tree / "platform"))


def _from_tree(root: Path) -> Package:
    """What pyproject.toml puts into a wheel, as far as git tracks it."""
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    known = tracked(root)
    files, left_out = {}, []
    for package in settings["packages"]:
        folder = root / settings["package-dir"][package]
        patterns = ["*.py", *settings["package-data"].get(package, ())]
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            if known is None or path in known:
                files[f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
            else:
                left_out.append(path.relative_to(root).as_posix())
    return Package(files, left_out)


def _installed() -> Package:
    installed = importlib.metadata.distribution("setwise")
    listed = [name for name in installed.files or () if name.parts[0] == "setwise" and name.suffix != ".pyc"]
    return Package({name.as_posix(): Path(str(installed.locate_file(name))) for name in listed})


def tracked(folder: Path) -> set[Path] | None:
    """Files below a folder that git tracks and that are there; None where it is in no checkout."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    return {folder / name for name in names if (folder / name).is_file()}


def _files_of(path: Path, here: Path) -> list[Path]:
    place = here / path
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ConfigError(f"--file {path}: there is no such file")
    known = tracked(place)
    found = sorted(file for file in place.rglob("*") if file.is_file()) if known is None else sorted(known)
    if not found:
        raise ConfigError(f"--file {path}: nothing to send; in a checkout, only files that git tracks are")
    return found


def _name_below(here: Path, file: Path) -> str:
    name = os.path.relpath(file, here)
    if name.startswith(".."):
        raise ConfigError(f"--file {name}: only files below this folder have a path that means the same in a job")
    return Path(name).as_posix()
