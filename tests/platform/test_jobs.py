"""Jobs on a Ray cluster: what goes along, what comes back, and what is said where no cluster answers as it should."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from setwise.platform import jobs
from setwise.platform.errors import ConfigError, SetwiseError, UnreachableError
from setwise.platform.jobs import Job, Jobs

TOKEN = "a" * 64


@dataclass
class Dashboard:
    """Answers the first questions as the head of a cluster does."""

    mode: str = "token"
    ray: str = importlib.metadata.version("ray")
    python: str = platform.python_version()
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, Any]]:
        self.asked.append(path)
        if path == "/api/authentication_mode":
            return 200, {"authentication_mode": self.mode}
        if self.mode == "token" and authorization != f"Bearer {TOKEN}":
            return (403 if authorization else 401), {}
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": self.ray}
        return 200, {"data": {"rayVersion": self.ray, "pythonVersion": self.python}}


@pytest.fixture
def dashboard() -> Iterator[tuple[Dashboard, str]]:
    head = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, answer = head.answer(self.path, self.headers.get("Authorization"))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield head, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # put back afterwards, whatever is set meanwhile
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


class Client:
    """Ray's client, of a cluster with one job that writes `texts`; its connection breaks after `breaks` of them."""

    def __init__(self, details: Any, texts: Sequence[str] = (), breaks: Sequence[int] = ()) -> None:
        self.details, self.texts, self.breaks = details, texts, list(breaks)
        self.over = not texts

    def get_job_info(self, job: str) -> Any:
        if job != "here":
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return self.details if self.over else details("RUNNING")

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for number, text in enumerate(self.texts):
            if self.breaks and number == self.breaks[0]:
                del self.breaks[0]
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield text
        self.over = True


def details(status: str, code: int | None = None, message: str = "") -> Any:
    @dataclass
    class Details:
        submission_id = "here"
        entrypoint = "exec python -m timeit"
        start_time = 1_700_000_000_500
        end_time = None

    found: Any = Details()
    found.status, found.driver_exit_code, found.message = status, code, message
    return found


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 6, 6),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_of_a_job_is_that_of_its_command(status: str, code: int | None, expected: int | None) -> None:
    job = Jobs("http://x", Client(details(status, code))).get("here")
    assert job.exit_code == expected
    assert job.started == 1_700_000_000.5


@pytest.mark.parametrize("breaks", [[], [1], [2, 0, 1]])
def test_a_broken_connection_neither_loses_nor_repeats_a_line(
    breaks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 0)
    written: list[str] = []
    cluster = Jobs("http://x", Client(details("FAILED", 3), ["one\n", "two\n", "three\n"], breaks))
    assert cluster.follow("here", written.append).exit_code == 3
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_job_that_is_not_there_is_a_mistake_of_the_command_line() -> None:
    cluster = Jobs("http://x", Client(details("RUNNING")))
    for name in ("other", "../other", ""):
        with pytest.raises(ConfigError, match=r"no such job|no id of a job"):
            cluster.get(name)


def test_the_command_reaches_python_as_it_was_typed(tmp_path: Path) -> None:
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\nfor word in "$@"; do printf \'%s\\n\' "$word"; done\nexit 5\n')
    shown.chmod(0o755)
    words = ["m.cli", "search", "a red 'three' above \"seven\"", "$(touch hacked); exit 0", "x=[1,2]*", "", "--json"]
    line = jobs.command_line(words)
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
    assert done.returncode == 5
    done = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=False
    )
    assert done.stdout.decode().split("\n")[:-1] == ["-m", *words]
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "name", ["RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_KEY", "HF_TOKEN", "DB_PASSWORD", "API_KEY", "PGPASSWORD"]
)
def test_what_looks_like_a_secret_is_not_sent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "canary")
    with pytest.raises(ConfigError, match=f"{name} looks like a secret.*readable by everybody") as refused:
        jobs.public_environment([name])
    assert "canary" not in str(refused.value)


def test_an_address_with_a_password_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKING", "https://user:canary@host/path")
    with pytest.raises(ConfigError, match="TRACKING holds a password, or") as refused:
        jobs.public_environment(["TRACKING"])
    monkeypatch.setenv("HF_TOKEN", "canary-0123")
    monkeypatch.setenv("OPTIONS", "use:canary-0123")
    with pytest.raises(ConfigError, match="OPTIONS holds a password, or what a secret variable does"):
        jobs.public_environment(["OPTIONS"])
    words = ["m", "x=postgresql://user:canary@host/db"]
    with pytest.raises(ConfigError, match="holds a password") as typed:
        Jobs("http://x", Client(None)).submit(words, Path("x.zip"), {}, None)
    assert "canary" not in f"{refused.value}{typed.value}"


def test_other_variables_are_sent_with_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MONKEYS", "https://user@host:80/path")
    found = jobs.public_environment(["OMP_NUM_THREADS", "MONKEYS"])
    assert found == {"OMP_NUM_THREADS": "1", "MONKEYS": "https://user@host:80/path"}
    with pytest.raises(ConfigError, match="NOT_THERE is not set"):
        jobs.public_environment(["NOT_THERE"])


def test_a_name_that_is_no_id_is_refused() -> None:
    for name in ("a/b", "..", "a b", "x" * 81):
        with pytest.raises(ConfigError, match="cannot name a job"):
            Jobs("http://x", Client(None)).submit(["m"], Path("x.zip"), {}, name)


def test_a_cluster_of_our_versions_that_knows_our_token_is_taken(
    dashboard: tuple[Dashboard, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = dashboard
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # Ray would prefer it to the address that was given
    found = jobs.connect(f"{url}/")
    assert (found.url, found.warning, found.client.get_address()) == (url, None, url)


def test_without_the_right_token_nothing_is_sent(
    dashboard: tuple[Dashboard, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, url = dashboard
    with pytest.raises(UnreachableError, match="asks for a token and there is none here"):
        jobs.connect(url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    with pytest.raises(UnreachableError, match="the token is not the cluster's"):
        jobs.connect(url)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH names /nowhere/token: No such file"):
        jobs.connect(url)
    assert not any(path.startswith(("/api/jobs", "/api/packages")) for path in head.asked)


@pytest.mark.parametrize(("python", "ray"), [("3.9.7", None), (None, "2.1.0"), ("", "")])
def test_other_versions_are_refused_and_both_sides_named(
    dashboard: tuple[Dashboard, str], python: str | None, ray: str | None
) -> None:
    head, url = dashboard
    head.mode = "disabled"
    head.python, head.ray = (head.python if python is None else python), (head.ray if ray is None else ray)
    with pytest.raises(ConfigError) as refused:
        jobs.connect(url)
    theirs, ours = f"Python {head.python or '?'}, Ray {head.ray or '?'}", f"Python {platform.python_version()}, Ray"
    assert f"{url} has {theirs}; here is {ours} {importlib.metadata.version('ray')}." in str(refused.value)


def test_the_last_number_of_a_version_may_differ() -> None:
    ours = [*platform.python_version_tuple()[:2], "99"], [*importlib.metadata.version("ray").split(".")[:2], "99"]
    jobs.compare_versions("http://x", *(".".join(numbers) for numbers in ours))


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_where_nothing_listens_is_told_at_once(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}.*refused"):
        jobs.connect(address.format(port))


def test_a_head_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UnreachableError, match=r"no Ray dashboard at .*timed out"),
    ):
        jobs.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_an_address_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="which cluster"):
        jobs.connect()
    for address in ("ray://head:10001", "head", "head:", "local"):
        with pytest.raises(ConfigError, match=f"'{address}' is no address of a cluster"):
            jobs.connect(address)


def test_only_an_open_door_off_this_machine_is_warned_of() -> None:
    assert "asks for no token" in str(jobs.warning_about("http://10.0.0.7:8265", "disabled"))
    for url, mode in [
        ("http://10.0.0.7:8265", "token"),
        ("http://127.0.0.1:8265", "disabled"),
        ("http://[::1]:8265", "disabled"),
        ("http://localhost:8265", "disabled"),
    ]:
        assert jobs.warning_about(url, mode) is None


def test_a_client_s_other_failures_keep_their_reason() -> None:
    class Refusing:
        def list_jobs(self) -> list[Job]:
            raise RuntimeError("Request failed with status code 500: No available agent.")

        def get_job_logs(self, job: str) -> str:
            raise ConnectionError("gone")

    with pytest.raises(SetwiseError, match="No available agent"):
        Jobs("http://x", Refusing()).all()
    with pytest.raises(UnreachableError, match="http://x does not answer: gone"):
        Jobs("http://x", Refusing()).logs("here")
