"""Real servers for tests, each on a free port of this machine: MLflow, PostgreSQL, S3, and what comes between."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

START_S = 120
POSTGRES = "/usr/lib/postgresql"  # where Debian's package puts its programs, by version


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class MlflowServer:
    """One server process and its worker, with their database and artifacts in `folder`; it may be killed and started
    again, on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers: 10 to 20 seconds."""
        stores = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        stores += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *stores, *place],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"MLflow did not start:\n{(self.folder / 'server.log').read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the server and its worker, which are a process group of their own."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """A server that answers, as `uri`, with `kill()` and `start()`."""
    folder.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


BUCKET = "setwise-tests"


class S3Server:
    """moto, which answers as S3 does, with what it holds in memory.

    Attributes:
        keys: the environment by which a client is let in; anybody is, unless the server `knows_keys`.
    """

    def __init__(self, folder: Path, knows_keys: bool = False) -> None:
        self.folder, self.knows_keys = folder, knows_keys
        self.host = f"127.0.0.1:{free_port()}"
        self.keys = {"AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": "anything"}
        self.process: subprocess.Popen[bytes] | None = None

    def address(self, place: str) -> str:
        """That of a bucket, or of a prefix in it, for SETWISE_MIRROR."""
        return f"s3://{place}?endpoint_override={self.host}&scheme=http"

    def client(self, service: str = "s3") -> Any:
        import boto3

        key, secret = self.keys.values()
        place = {"endpoint_url": f"http://{self.host}", "region_name": "us-east-1"}
        return boto3.client(service, aws_access_key_id=key, aws_secret_access_key=secret, **place)

    def start(self, bucket: str) -> None:
        """Start empty, wait until it answers, and make a bucket: a second."""
        before_keys_count = {"INITIAL_NO_AUTH_ACTION_COUNT": "4"} if self.knows_keys else {}
        host, port = self.host.split(":")
        with (self.folder / "s3.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", host, "-p", port],
                stdout=log,
                stderr=log,
                env={**os.environ, **before_keys_count},
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.host}/moto-api/", timeout=5):
                break
            time.sleep(0.05)
        self.client().create_bucket(Bucket=bucket)
        if self.knows_keys:
            users = self.client("iam")
            users.create_user(UserName="setwise")
            anything = {"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}], "Version": "2012-10-17"}
            users.put_user_policy(UserName="setwise", PolicyName="any", PolicyDocument=json.dumps(anything))
            made = users.create_access_key(UserName="setwise")["AccessKey"]
            self.keys = dict(zip(self.keys, (made["AccessKeyId"], made["SecretAccessKey"]), strict=True))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def s3_server(folder: Path, bucket: str, knows_keys: bool = False) -> Iterator[S3Server]:
    """A server with one empty bucket; `kill()` and `start()` on the same port empty it."""
    folder.mkdir(parents=True, exist_ok=True)
    server = S3Server(folder, knows_keys)
    try:
        server.start(bucket)
        yield server
    finally:
        server.kill()


HALF = """
import sys, time
from pathlib import Path
from setwise.platform.mirror import Mirror, open_mirror
whole = Mirror._copy
def half(here, source, there, target):
    if Path(source).name != sys.argv[1]:
        return whole(here, source, there, target)
    content = Path(source).read_bytes()
    stream = there.open_output_stream(target)
    stream.write(content[: len(content) // 2])
    print("half", flush=True)
    time.sleep(600)
Mirror._copy = staticmethod(half)
"""


def killed_in_mid_upload(file: str, program: str, *arguments: str) -> None:
    """Run `program`, which sends to a mirror, in a process that is killed when half of one `file` has been sent.

    The program finds its arguments from sys.argv[2] on, and `open_mirror` imported.
    """
    words = [sys.executable, "-c", HALF + program, file, *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
    assert said == "half\n" and process.returncode == -signal.SIGKILL


class Faults(ThreadingHTTPServer):
    """Stands between a client and an MLflow server, and does to the calls what `fault` says.

    Attributes:
        fault: `none`; `500` for an answer instead of the server's; `slow` lets the server do its work and answers too
            late; `late` hands the call on only after the client has given up; `reset` closes the connection, `half`
            in the middle of the answer.
        only: the end of the paths that it is done to.
        delay: how late is late, in seconds.
        late: how many late calls the server has taken.
    """

    daemon_threads = True

    def __init__(self, target: str, delay: float) -> None:
        super().__init__(("127.0.0.1", 0), FaultsHandler)
        self.target, self.delay = target, delay
        self.fault, self.only, self.late = "none", "", 0
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """That the client has gone is what we are for."""


class FaultsHandler(BaseHTTPRequestHandler):
    server: Faults

    def _call(self) -> None:
        path = self.path.partition("?")[0]
        fault = self.server.fault if path.endswith(self.server.only) else "none"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "reset":
            return
        if fault == "500":
            self._answer(500, b"{}")
            return
        if fault == "late":
            time.sleep(self.server.delay)
        call = urllib.request.Request(self.server.target + self.path, body or None, method=self.command)
        call.add_header("Content-Type", self.headers.get("Content-Type", "application/json"))
        try:
            with urllib.request.urlopen(call, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        self.server.late += fault == "late"
        if fault == "slow":
            time.sleep(self.server.delay)
        self._answer(status, content, cut=fault == "half")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _call  # noqa: N815  # the base class calls them by these names

    def _answer(self, status: int, content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def faults(target: str, delay: float = 2.0) -> Iterator[Faults]:
    """A server between clients, who call its `uri`, and `target`."""
    with Faults(target, delay) as between:
        thread = threading.Thread(target=between.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield between
        finally:
            between.shutdown()
            thread.join()


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server that answers, as the URL of an empty database. Its log lies in `folder`.

    It refuses to run as root, and its own user may not look into our temporary folders: its data lie beside them.
    """
    programs = _postgres_programs()
    folder.mkdir(parents=True, exist_ok=True)
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    data = Path(tempfile.mkdtemp(prefix="setwise-postgres-"))
    shutil.chown(data, user)
    port = free_port()
    options = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
    process: subprocess.Popen[bytes] | None = None
    try:
        with (folder / "postgres.log").open("wb") as log:
            create = [
                programs / "initdb",
                "-D",
                data / "db",
                "-U",
                "setwise",
                "--auth=trust",
                "--no-sync",
                "-E",
                "UTF8",
            ]
            subprocess.run(create, user=user, cwd=data, stdout=log, stderr=log, check=True)
            run = [programs / "postgres", "-D", data / "db", *(part for one in options for part in ("-c", one))]
            process = subprocess.Popen(run, user=user, cwd=data, stdout=log, stderr=log)
        url = f"postgresql://setwise@127.0.0.1:{port}"
        _create_database(f"{url}/postgres", folder / "postgres.log")
        yield f"{url}/setwise"
    finally:
        if process is not None:
            process.send_signal(signal.SIGQUIT)  # at once, and its children too
            process.wait()
        shutil.rmtree(data)


def _postgres_programs() -> Path:
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path(POSTGRES).glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    raise RuntimeError("these tests start a real PostgreSQL, which is not installed: apt-get install postgresql")


def _create_database(url: str, log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + START_S
    while True:
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
                connection.execute("CREATE DATABASE setwise")
                return
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {error}\n{log.read_text()[-3000:]}") from error
        time.sleep(0.1)
