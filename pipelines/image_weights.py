"""Weights that an image backbone starts from: torchvision's, those of a file, or those at an https address.

The published ResNeXt recipes start from ResNeXt-101 32x8d trained on hashtags ("WSL": Mahajan et al., "Exploring the
Limits of Weakly Supervised Pretraining", 2018), for torchvision's `resnext101_32x8d`. They are for non-commercial use
(CC BY-NC 4.0):

    weights: https://download.pytorch.org/models/ig_resnext101_32x8-c38310e5.pth
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from setwise.platform import storage
from setwise.platform.errors import ConfigError, DataError, UnreachableError

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_BYTES = 4 << 30
"""More than any of the networks has; whoever sends more sends something else."""
TIMEOUT_S = 60.0
WAIT_S = 3600.0
SECTION = "model.image_encoder"
"""Where a recipe names its backbone and weights: what a message says unless it is told another place."""
CHECKSUM = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
"""In a file's name, as torch.hub has it: the beginning of the content's SHA-256."""


def load(backbone: nn.Module, weights: str, architecture: str, cache: Path, section: str = SECTION) -> None:
    """Put `weights` into `backbone`, all of them or none.

    Args:
        backbone: parameters and buffers named as torchvision's, without `fc`.
        weights: a name of torchvision's weights for the architecture (IMAGENET1K_V2; kept where torch.hub keeps them),
            a file (.safetensors, or what torch.save wrote of a state dict, possibly under `state_dict`, possibly with
            `module.` before each name), or an https address of one.
        architecture: torchvision's name of the network.
        cache: folder for files fetched from an address.
        section: of the settings that name architecture and weights, for messages.

    Raises:
        ConfigError: an address that is not https.
        DataError: no such file or name; a damaged file; one that holds more than tensors; weights of another network.
        UnreachableError: the address does not answer; the message says where a file brought by hand would be found.
    """
    path = locate(weights, architecture, cache, section)
    given = _tensors(path)
    own = backbone.state_dict()
    # Files from before torch 0.4.1 have no such counters, which count for nothing.
    given = {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")} | given
    faults = {
        "missing": sorted(own.keys() - given.keys()),
        "not known": sorted(given.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in given and given[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        named = "; ".join(f"{kind}: {_first_of(names)}" for kind, names in faults.items() if names)
        raise DataError(
            f"{path}: these are not the weights of {architecture}. Nothing was loaded. {named}. "
            f"Set {section}.weights to weights of that network, or {section}.architecture to theirs."
        )
    backbone.load_state_dict(given)


def _first_of(names: list[str], num: int = 3) -> str:
    more = f" and {len(names) - num} more" if len(names) > num else ""
    return ", ".join(names[:num]) + more


def locate(weights: str, architecture: str, cache: Path, section: str = SECTION) -> Path:
    """The file that `weights` stand for, fetched if it has to be; arguments and errors as of `load`."""
    if "://" in weights:
        return _fetched(weights, cache, section)
    published = _published(architecture)
    if weights in published:
        import torch

        return _fetched(published[weights], Path(torch.hub.get_dir()) / "checkpoints", section)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise DataError(
            f"{section}.weights: '{weights}' is neither a file nor a name of torchvision's weights for {architecture} "
            f"({', '.join(published)}), nor an https address"
        )
    return path


def _published(architecture: str) -> dict[str, str]:
    """torchvision's names of weights for the architecture, and their addresses."""
    from torchvision.models import get_model_weights

    return {entry.name: entry.url for entry in get_model_weights(architecture)}


def _tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without `module.` in front and without the classifier `fc`."""
    import torch
    from safetensors.torch import load_file

    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes the readers raise is theirs to choose
        raise DataError(
            f"{path}: damaged, not a file of weights, or one that holds more than tensors and plain values, which is "
            f"not read because it could run code ({type(error).__name__})"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise DataError(f"{path}: expected a state dict, names with a tensor each, or one under the name 'state_dict'")
    weights = {str(name): value for name, value in content.items()}
    if all(name.startswith("module.") for name in weights):  # as DataParallel leaves them
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


def _fetched(url: str, folder: Path, section: str) -> Path:
    """The file at `url`, from `folder` if it is there and has the checksum that its name says."""
    parts = urlsplit(url)
    name = PurePosixPath(parts.path).name
    if parts.scheme != "https" or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(f"{section}.weights: '{url}' must be https://... and end in the name of a file")
    match = CHECKSUM.search(name)
    checksum = match[1] if match else ""
    # Without a checksum, equal names may stand for different files.
    path = folder / (name if checksum else f"{storage.fingerprint(url)}-{name}")
    if not _is_whole(path, checksum):
        with storage.lease(folder / f".{path.name}.lock", f"the download of {url}", WAIT_S):
            if not _is_whole(path, checksum):  # nobody else fetched it meanwhile
                _download(url, path, checksum, section)
    return path


def _is_whole(path: Path, checksum: str) -> bool:
    return path.is_file() and (not checksum or storage.sha256(path).startswith(checksum))


def _download(url: str, path: Path, checksum: str, section: str) -> None:
    digest = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for block in _received(url, path, section):
                digest.update(block)
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        if not digest.hexdigest().startswith(checksum):
            raise DataError(
                f"{url}: what came has the SHA-256 {digest.hexdigest()[: len(checksum)]}..., which its name denies. "
                "Try again; if it stays so, it is not the file that it claims to be."
            )
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    storage.sync_folder(path.parent)


def _received(url: str, path: Path, section: str) -> Iterator[bytes]:
    """The content at `url`, block by block."""
    size, announced = 0, ""
    try:
        with build_opener(_HttpsOnly).open(url, timeout=TIMEOUT_S) as response:
            announced = response.headers.get("Content-Length", "")
            while block := response.read(1 << 20):
                size += len(block)
                if size > MAX_BYTES:
                    raise DataError(f"{url}: more than {MAX_BYTES >> 20} MiB, which no network here has")
                yield block
        if announced and str(size) != announced:
            raise ConnectionError(f"the connection ended after {size} of {announced} bytes")
    except (OSError, HTTPException) as error:
        raise UnreachableError(
            f"{url} could not be fetched: {error}. Bring the file here by hand as {path}, or anywhere else and set "
            f"{section}.weights to its path."
        ) from error


class _HttpsOnly(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme != "https":
            raise HTTPError(req.full_url, code, f"sent on to {newurl}, which is not https", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
