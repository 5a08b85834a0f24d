"""A mirror of a store: what it keeps, as objects on an S3-compatible server, in Google's storage, or in another folder.

$SETWISE_MIRROR is its address; objects are named as files are in the store. An object store renames nothing at once, so
a folder goes up file by file and its manifest last: to a reader, a folder without its manifest does not exist. Until
then, `.unfinished` holds that manifest, so that an upload that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from setwise.platform import storage
from setwise.platform.errors import ConfigError, DataError, UnreachableError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

VARIABLE = "SETWISE_MIRROR"
UNFINISHED = ".unfinished"
DAMAGED = ".damaged"
"""What is added to the name of the manifest of a folder that was found damaged."""
CHUNK = 8 * 2**20  # bytes in memory of each file on its way
THREADS = 4  # files on their way at once: they wait for the network most of the time
PATIENCE_S = 30  # of Google's client, whose own is a quarter of an hour; that of S3 gives up after about 10 s
FORMS = (
    "s3://BUCKET/PREFIX (with ?endpoint_override=HOST:PORT&scheme=http&region=REGION for a server of one's own), "
    "gs://BUCKET/PREFIX or file:///FOLDER"
)
REASONS = {
    "NO_SUCH_BUCKET": "there is no such bucket; a mirror makes none",
    "RESOURCE_NOT_FOUND": "there is no such bucket; a mirror makes none",
    "NETWORK_CONNECTION": "it does not answer",
    **dict.fromkeys(
        ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH"),
        "it refuses these credentials; look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and at what they may do",
    ),
}


class Mirror:
    """What is in the mirror of a store, by name: a path relative to the store, with slashes.

    Attributes:
        address: for people to read, without the details of the connection.
        store: the folder that it mirrors.

    Every method raises UnreachableError where the mirror does not answer or refuses.
    """

    def __init__(self, filesystem: FileSystem, base: str, address: str, store: Path) -> None:
        from pyarrow.fs import LocalFileSystem

        self.address, self.store = address, store
        self._filesystem, self._base = filesystem, base.rstrip("/")
        self._local = LocalFileSystem()

    def files(self, name: str) -> dict[str, int]:
        """The objects below `name`, relative to it, with their sizes in bytes; none if it is not there."""
        from pyarrow.fs import FileSelector, FileType

        top = self._path(name)
        with self._asking():
            found = self._filesystem.get_file_info(FileSelector(top, recursive=True, allow_not_found=True))
        return {one.path.removeprefix(f"{top}/"): one.size for one in found if one.type == FileType.File}

    def names(self, name: str) -> list[str]:
        """What lies directly below `name`, sorted."""
        from pyarrow.fs import FileSelector

        with self._asking():
            found = self._filesystem.get_file_info(FileSelector(self._path(name), allow_not_found=True))
        return sorted(one.base_name for one in found if not one.base_name.startswith("."))

    def read(self, name: str) -> bytes | None:
        """The content of an object, None if it is not there."""
        with self._asking():
            try:
                with self._filesystem.open_input_stream(self._path(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace an object: a reader sees the old content or the new."""

        def put(path: str) -> None:
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(data)

        self._replace(name, put)

    def push(self, name: str, manifest: str) -> bool:
        """Copy the folder `name` of the store into the mirror, where it becomes visible with its manifest.

        What an earlier push of the same manifest has sent is not sent again. Of another one everything is removed
        first, since files of two would be mixed where an upload is killed.

        Args:
            manifest: the file of the folder that is written last.

        Returns:
            False if the mirror has it already.

        Raises:
            FileNotFoundError: the folder, or a file of it, was removed meanwhile.
            DataError: a file changed meanwhile, or the server has not kept all of it.
        """
        folder = self.store / name
        wanted = (folder / manifest).read_bytes()
        if self.read(f"{name}/{manifest}") == wanted:
            return False
        if self.read(f"{name}/{UNFINISHED}") != wanted:
            self.remove(name, manifest)
            self.write(f"{name}/{UNFINISHED}", wanted)
        there = self.files(name)
        paths = [path for path in sorted(folder.rglob("*")) if _is_kept(path, folder)]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        missing = [file for file, size in sizes.items() if file != manifest and there.get(file) != size]
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self._send, (f"{name}/{file}" for file in missing)):
                pass
        there = self.files(name)
        for file, size in sizes.items():
            if file != manifest and there.get(file) != size:
                raise DataError(
                    f"{folder / file} has {size:,} bytes, and its copy in {self.address} {there.get(file, 0):,}: it "
                    "changed while it was copied, or the server lost some"
                )
        self.write(f"{name}/{manifest}", wanted)
        for left in there.keys() - sizes.keys():
            with self._asking(), contextlib.suppress(FileNotFoundError):
                self._filesystem.delete_file(self._path(f"{name}/{left}"))
        return True

    def pull(self, name: str, manifest: str, verify: Callable[[Path], None]) -> None:
        """Copy the folder `name` of the mirror into the store, where it appears once it is whole.

        Args:
            verify: called with the folder as it was copied; raises DataError if it is damaged.

        Raises:
            DataError: the mirror has no such folder, or it is damaged.
        """
        there = self.files(name)
        if manifest not in there:
            raise DataError(f"{self.address} has no whole {name}")
        for file in there:
            if ".." in PurePosixPath(file).parts or file.startswith("/"):
                raise DataError(f"{self.address}/{name}: an object is called '{file}', which leads out of its folder")
        with storage.publish_folder(self.store / name) as building:
            wanted = {f"{name}/{file}": building / file for file in there if _is_kept(building / file, building)}
            try:
                with ThreadPoolExecutor(THREADS) as pool:
                    for _ in pool.map(self._fetch, wanted, wanted.values()):
                        pass
                verify(building)
            except FileNotFoundError as error:
                raise DataError(f"{self.address}/{name} was removed while it was copied from there") from error
            except DataError as error:
                raise DataError(str(error).replace(str(building), f"{self.address}/{name}")) from error

    def set_aside(self, name: str, manifest: str) -> None:
        """Let the folder `name` of the mirror, which is damaged, not exist; the next push of it puts it right."""
        old, new = (self._path(f"{name}/{file}") for file in (manifest, manifest + DAMAGED))
        with self._asking():
            self._filesystem.move(old, new)

    def remove(self, name: str, manifest: str | None = None) -> None:
        """Remove a folder of the mirror, its manifest first."""
        with self._asking():
            if manifest is not None:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.delete_file(self._path(f"{name}/{manifest}"))
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.delete_dir(self._path(name))

    def check(self) -> None:
        """Write, read and remove a probe. Raises UnreachableError, saying why, where that is not possible."""
        probe = f".probe-{secrets.token_hex(8)}"
        self.write(probe, b"setwise")
        if self.read(probe) != b"setwise":
            raise UnreachableError(f"{self.address} does not give back what was written to it")
        with self._asking():
            self._filesystem.delete_file(self._path(probe))

    def _send(self, name: str) -> None:
        source = str(self.store / name)
        self._replace(name, lambda path: self._copy(self._local, source, self._filesystem, path))

    def _fetch(self, name: str, target: Path) -> None:
        with self._asking(), storage.writing_to(self.store):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._copy(self._filesystem, self._path(name), self._local, str(target))

    @staticmethod
    def _copy(here: FileSystem, source: str, there: FileSystem, target: str) -> None:
        from pyarrow.fs import copy_files

        copy_files(
            source, target, source_filesystem=here, destination_filesystem=there, chunk_size=CHUNK, use_threads=False
        )

    def _replace(self, name: str, put: Callable[[str], None]) -> None:
        """Let `put` write the object `name`. On a server it appears once it is whole; a file has to be renamed."""
        path = self._path(name)
        with self._asking():
            if not isinstance(self._filesystem, type(self._local)):
                put(path)
                return
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            part = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(8)}")
            try:
                put(str(part))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pyarrow.ArrowException) as error:
            raise UnreachableError(f"mirror {self.address}: {_reason(error)}") from error


def _is_kept(path: Path, folder: Path) -> bool:
    """Whether a file belongs to a folder; hidden ones are somebody's work in progress, of ours or theirs."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and not path.name.endswith(DAMAGED) and not path.is_dir()


def _reason(error: Exception) -> str:
    """Why a server did not do what was asked, first in our words where they are known."""
    text = " ".join(str(error).split())[:400]
    found = re.search(r"AWS Error ([A-Z_]+)", text)
    known = REASONS.get(found[1]) if found else None
    return f"{known} ({text})" if known else text


def open_mirror(store: Path) -> Mirror | None:
    """The mirror of `store` that $SETWISE_MIRROR names, None if it names none. Nothing is asked of it yet.

    Credentials are those that the cloud's own clients would find: AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, a file
    in the home folder, the machine's role. AWS_ENDPOINT_URL and AWS_REGION hold where the address names none.

    Raises:
        ConfigError: the address cannot be one, or has credentials in it.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    parts = urlsplit(given)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "@" in parts.netloc:
        raise ConfigError(
            f"{VARIABLE} has credentials in it, and addresses are shown: give them by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or as the cloud's own clients read them"
        )
    base, address = parts.netloc + parts.path.rstrip("/"), f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    allowed = {"s3": {"endpoint_override", "scheme", "region"}, "gs": {"endpoint_override", "scheme"}, "file": set()}
    bucket = parts.scheme == "file" or parts.netloc
    if parts.scheme not in allowed or not bucket or (parts.scheme == "file" and (parts.netloc or not parts.path)):
        raise ConfigError(f"{VARIABLE} is '{address}'; it can be {FORMS}")
    if unknown := set(options) - allowed[parts.scheme]:
        raise ConfigError(f"{VARIABLE} has the unknown option '{sorted(unknown)[0]}'; it can be {FORMS}")
    if parts.scheme == "file":
        from pyarrow.fs import LocalFileSystem

        return Mirror(LocalFileSystem(), unquote(parts.path), address, store)
    return Mirror((_s3 if parts.scheme == "s3" else _google)(options), base, address, store)


def _s3(options: dict[str, str]) -> FileSystem:
    """Writes in the foreground: in the background, all of a file would wait in memory for a slow network."""
    from pyarrow.fs import S3FileSystem

    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = environment.rstrip("/").rpartition("://")
    endpoint = options.get("endpoint_override", host) or None
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return S3FileSystem(
        endpoint_override=endpoint,
        scheme=options.get("scheme", scheme) or "https",
        region=region or ("us-east-1" if endpoint else None),  # what a server of one's own calls its region
        background_writes=False,
        allow_delayed_open=True,  # small files in one request
    )


def _google(options: dict[str, str]) -> FileSystem:
    from pyarrow.fs import GcsFileSystem

    return GcsFileSystem(
        endpoint_override=options.get("endpoint_override"),
        scheme=options.get("scheme", "https"),
        retry_time_limit=timedelta(seconds=PATIENCE_S),
    )
