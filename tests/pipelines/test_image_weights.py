"""Weights of a backbone are loaded whole or not at all, run no code, and come over https alone."""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torchvision
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from safetensors.torch import save_file
from torch import Tensor, nn

from setwise.models.config import GridConfig
from setwise.models.image_encoders import Backbone
from setwise.pipelines import image_weights
from setwise.platform.errors import ConfigError, DataError, SetwiseError, UnreachableError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """What a file of torchvision's resnet18 holds, classifier included."""
    torch.manual_seed(1)
    network = torchvision.models.resnet18(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return network.state_dict()


@pytest.fixture(scope="module")
def shared_backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18")


@pytest.fixture
def backbone(shared_backbone: Backbone) -> Iterator[Backbone]:
    """Random weights that no other test has changed."""
    before = {name: value.clone() for name, value in shared_backbone.state_dict().items()}
    yield shared_backbone
    shared_backbone.load_state_dict(before)


def load(backbone: nn.Module, weights: str | Path, cache: Path) -> None:
    image_weights.load(backbone, str(weights), "resnet18", cache)


def assert_loaded(backbone: nn.Module, state: State) -> None:
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


def assert_refused(
    backbone: nn.Module, weights: str | Path, cache: Path, error: type[SetwiseError], message: str
) -> None:
    """The error, and that nothing of the backbone has changed."""
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(error, match=message):
        load(backbone, weights, cache)
    assert_loaded(backbone, before)


# --- files ------------------------------------------------------------------------------------------------------


def write(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pt"])
def test_a_file_is_loaded_without_its_classifier(backbone: Backbone, state: State, tmp_path: Path, name: str) -> None:
    load(backbone, write(tmp_path / name, state), tmp_path)
    assert_loaded(backbone, state)


def test_a_training_checkpoint_of_several_devices_is_understood(
    backbone: Backbone, state: State, tmp_path: Path
) -> None:
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "checkpoint.pth.tar")
    load(backbone, tmp_path / "checkpoint.pth.tar", tmp_path)
    assert_loaded(backbone, state)


def test_an_old_file_is_understood(backbone: Backbone, state: State, tmp_path: Path) -> None:
    """As of 2018: not a zip archive, and without counters of batches."""
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load(backbone, tmp_path / "old.pth", tmp_path)
    assert_loaded(backbone, state)


def test_weights_that_do_not_fit_are_named_and_none_is_loaded(backbone: Backbone, state: State, tmp_path: Path) -> None:
    missing = {name: value for name, value in state.items() if not name.startswith("layer4.1.conv")}
    file = write(tmp_path / "missing.pth", missing)
    assert_refused(
        backbone, file, tmp_path, DataError, r"missing: layer4\.1\.conv1\.weight, layer4\.1\.conv2\.weight\."
    )
    surplus = state | {"head.weight": torch.zeros(2)}
    file = write(tmp_path / "surplus.pth", surplus)
    assert_refused(backbone, file, tmp_path, DataError, r"not known: head\.weight\.")
    shape = state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    file = write(tmp_path / "shape.safetensors", shape)
    message = r"of another shape: conv1\.weight \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)"
    assert_refused(backbone, file, tmp_path, DataError, message)


def test_weights_of_another_network_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    file = write(tmp_path / "other.pth", torchvision.models.squeezenet1_0(weights=None).state_dict())
    message = r"not the weights of resnet18\. Nothing was loaded\. missing: .* and \d+ more; not known: .*architecture"
    assert_refused(backbone, file, tmp_path, DataError, message)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused(backbone: Backbone, state: State, tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"weights{suffix}", state)
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(backbone, file, tmp_path, DataError, f"weights{suffix}: damaged")
    file.write_bytes(b"<html>no such file</html>")
    assert_refused(backbone, file, tmp_path, DataError, f"weights{suffix}: damaged")
    file.write_bytes(b"")
    assert_refused(backbone, file, tmp_path, DataError, f"weights{suffix}: damaged")


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def test_a_file_that_would_run_code_runs_none(backbone: Backbone, state: State, tmp_path: Path) -> None:
    torch.save(state | {"conv1.weight": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    assert_refused(backbone, tmp_path / "evil.pth", tmp_path, DataError, "could run code")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload of this test works"


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3, "model": {}}, {"conv1.weight": 1}])
def test_what_is_no_state_dict_is_refused(backbone: Backbone, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(backbone, tmp_path / "weights.pth", tmp_path, DataError, "expected a state dict")


def test_neither_a_file_nor_a_name_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    message = r"'IMAGENET1K_V7' is neither a file nor a name .* for resnet18 \(IMAGENET1K_V1\), nor an https address"
    assert_refused(backbone, "IMAGENET1K_V7", tmp_path, DataError, message)
    assert_refused(backbone, tmp_path, tmp_path, DataError, "neither a file")


# --- addresses --------------------------------------------------------------------------------------------------


class Server:
    """Answers over TLS on this machine. `answers` has content by path, or a path or address to be sent on to."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, bytes | str] = {}
        self.announced: dict[str, int] = {}
        self.asked: list[str] = []
        self.certificate = folder / "certificate.pem"
        self._write_certificate()
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers.asked.append(self.path)
                answer = answers.answers.get(self.path)
                if answer is None:
                    self.send_error(404)
                    return
                self.send_response(302 if isinstance(answer, str) else 200)
                if isinstance(answer, str):
                    self.send_header("Location", answer)
                    answer = b""
                self.send_header("Content-Length", str(answers.announced.get(self.path, len(answer))))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.address = f"https://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _write_certificate(self) -> None:
        key, name = (
            ec.generate_private_key(ec.SECP256R1()),
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")]),
        )
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        form = serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        self.certificate.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server whose certificate is trusted, with nothing to give yet."""
    monkeypatch.setenv("SSL_CERT_FILE", str(running.certificate))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for kept in (running.answers, running.announced, running.asked):
        kept.clear()
    return running


@pytest.fixture(scope="module")
def content(state: State, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("content") / "weights.pth", state).read_bytes()


def name_of(content: bytes) -> str:
    return f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_an_address_is_fetched_once(
    backbone: Backbone, state: State, content: bytes, server: Server, tmp_path: Path
) -> None:
    name = name_of(content)
    server.answers[f"/models/{name}"] = content
    for _ in range(2):
        load(backbone, f"{server.address}/models/{name}", tmp_path / "new" / "cache")
        assert_loaded(backbone, state)
    assert server.asked == [f"/models/{name}"]
    assert left(tmp_path / "new" / "cache") == [name]


def test_equal_names_without_a_checksum_are_kept_apart(
    backbone: Backbone, state: State, content: bytes, server: Server, tmp_path: Path
) -> None:
    server.answers |= {"/a/weights.pth": content, "/b/weights.pth": b"something else"}
    assert_refused(backbone, f"{server.address}/b/weights.pth", tmp_path, DataError, "damaged")
    load(backbone, f"{server.address}/a/weights.pth", tmp_path)
    assert_loaded(backbone, state)
    assert len(left(tmp_path)) == 2


def test_a_kept_file_that_was_damaged_is_fetched_anew(
    backbone: Backbone, state: State, content: bytes, server: Server, tmp_path: Path
) -> None:
    name = name_of(content)
    server.answers[f"/{name}"] = content
    (tmp_path / name).write_bytes(content[:1000])
    load(backbone, f"{server.address}/{name}", tmp_path)
    assert_loaded(backbone, state)


def test_content_that_its_name_denies_is_refused(
    backbone: Backbone, content: bytes, server: Server, tmp_path: Path
) -> None:
    server.answers["/weights-0123abcd.pth"] = content
    url = f"{server.address}/weights-0123abcd.pth"
    assert_refused(backbone, url, tmp_path, DataError, "which its name denies")
    assert left(tmp_path) == []


def test_a_connection_that_ends_early_leaves_nothing(
    backbone: Backbone, content: bytes, server: Server, tmp_path: Path
) -> None:
    server.answers["/weights.pth"] = content[:1000]
    server.announced["/weights.pth"] = len(content)
    url = f"{server.address}/weights.pth"
    assert_refused(backbone, url, tmp_path, UnreachableError, f"ended after 1000 of {len(content)} bytes")
    assert left(tmp_path) == []


def test_more_than_any_network_holds_is_refused(
    backbone: Backbone, content: bytes, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_weights, "MAX_BYTES", 4 << 20)
    server.answers["/weights.pth"] = content
    assert_refused(backbone, f"{server.address}/weights.pth", tmp_path, DataError, "more than 4 MiB")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/weights.pth", "ftp://127.0.0.1/weights.pth", "file:///weights.pth", "https://127.0.0.1/"]
)
def test_other_addresses_are_not_even_asked(backbone: Backbone, tmp_path: Path, url: str) -> None:
    assert_refused(backbone, url, tmp_path, ConfigError, "must be https://... and end in the name of a file")


def test_a_redirection_is_followed_over_https_alone(
    backbone: Backbone, state: State, content: bytes, server: Server, tmp_path: Path
) -> None:
    server.answers |= {"/here/weights.pth": f"{server.address}/there.pth", "/there.pth": content}
    load(backbone, f"{server.address}/here/weights.pth", tmp_path)
    assert_loaded(backbone, state)
    server.answers["/weights.pth"] = "http://127.0.0.1:1/weights.pth"
    url = f"{server.address}/weights.pth"
    assert_refused(backbone, url, tmp_path, UnreachableError, "sent on to http://127.0.0.1:1/weights.pth, which is not")


def test_a_server_that_cannot_show_who_it_is_is_not_believed(
    backbone: Backbone, content: bytes, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    server.answers["/weights.pth"] = content
    assert_refused(backbone, f"{server.address}/weights.pth", tmp_path, UnreachableError, "CERTIFICATE_VERIFY_FAILED")
    assert server.asked == []


def test_what_is_not_there_or_does_not_answer_says_how_to_do_without(
    backbone: Backbone, server: Server, tmp_path: Path
) -> None:
    message = r"404.*Bring the file here by hand as .*weights-0123abcd\.pth, or .* set model\.image_encoder\.weights"
    assert_refused(backbone, f"{server.address}/weights-0123abcd.pth", tmp_path, UnreachableError, message)
    assert_refused(backbone, "https://127.0.0.1:1/weights.pth", tmp_path, UnreachableError, "refused.*by hand")


# --- torchvision's names ----------------------------------------------------------------------------------------


def test_a_name_of_torchvision_is_kept_where_torch_hub_keeps_it(
    backbone: Backbone,
    state: State,
    content: bytes,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = name_of(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(image_weights, "_published", lambda _: {"IMAGENET1K_V1": f"{server.address}/{name}"})
    server.answers[f"/{name}"] = content
    load(backbone, "IMAGENET1K_V1", tmp_path / "cache")
    assert_loaded(backbone, state)
    assert left(tmp_path / "home" / "hub" / "checkpoints") == [name]
    assert not (tmp_path / "cache").exists()


def test_offline_the_wanted_file_and_its_place_are_named(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    message = r"https://download.*resnet18-f37072fd\.pth could not be fetched.*hub/checkpoints/resnet18-f37072fd\.pth"
    assert_refused(backbone, "IMAGENET1K_V1", tmp_path, UnreachableError, message)


def test_torchvisions_weights_all_have_checksums() -> None:
    for architecture in get_args(GridConfig.model_fields["architecture"].annotation):
        published = image_weights._published(architecture)
        assert "IMAGENET1K_V1" in published
        for url in published.values():
            assert url.startswith("https://") and image_weights.CHECKSUM.search(url)
