"""Ray Jobs: commands that a cluster runs with files sent along, reached over HTTP at its head's dashboard.

A token is read from where Ray reads it itself: RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
Ray's own client waits without end for a head that accepts and says nothing, so the first questions are asked here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import ipaddress
import json
import logging
import os
import platform  # the standard library's
import re
import shlex
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from setwise.platform.cluster import WHERE_A_TOKEN_GOES
from setwise.platform.errors import INTERRUPTED, ConfigError, SetwiseError, UnreachableError
from setwise.platform.masking import SECRET_NAME, holds_secret

PATIENCE_S = 10
GRACE_S = 30  # between SIGTERM and SIGKILL; Ray's 3 s are short for a checkpoint
LOOK_S = 0.5  # between two looks at a job whose log has ended
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
READ_BY_ALL = (
    "The environment and the command of a job are readable by everybody on the cluster, and stand in its logs: "
    "give secrets to the nodes instead, in the environment in which Ray is started"
)


@dataclass(frozen=True)
class Job:
    """What a cluster knows of a job; times in seconds since 1970, None before it began or ended."""

    id: str
    status: str
    command: str
    message: str
    driver_code: int | None
    started: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int | None:
        """That of its command as a shell counts it; 1 where the command never began; None before it is over.

        Ray keeps none of a command that it was asked to stop: it is what `setwise` ends with then.
        """
        if not self.is_over:
            return None
        if self.driver_code is None:
            return {"SUCCEEDED": 0, "STOPPED": INTERRUPTED}.get(self.status, 1)
        return 128 - self.driver_code if self.driver_code < 0 else self.driver_code


@dataclass(frozen=True)
class Jobs:
    """The jobs of one cluster.

    Args:
        url: of the dashboard on its head.
        client: Ray's JobSubmissionClient.
        warning: what the user should know about the way there.
    """

    url: str
    client: Any
    warning: str | None = None

    def submit(self, words: Sequence[str], archive: Path, environment: Mapping[str, str], name: str | None) -> str:
        """Start `python -m WORDS` in a folder that holds what is in `archive`, a zip; returns the id of the job.

        The folder is on the search path of the command and of every process that it starts on the cluster.

        Raises:
            ConfigError: `name` is no id, or another job has it, or a word holds a secret.
        """
        if name is not None and not ID.fullmatch(name):
            raise ConfigError(f"'{name}' cannot name a job: use letters, digits, '.', '_' and '-', 80 at most")
        for word in words:
            if holds_secret(word):
                raise ConfigError(
                    f"the command holds a password, or what a secret environment variable does. {READ_BY_ALL}."
                )
        with self._asking():
            return str(
                self.client.submit_job(
                    entrypoint=command_line(words),
                    submission_id=name,
                    runtime_env={
                        "working_dir": str(archive),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), **environment},
                    },
                )
            )

    def all(self) -> list[Job]:
        """Every job that was submitted, the oldest first."""
        with self._asking():
            found = [_job(details) for details in self.client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or float("inf"))

    def get(self, job: str) -> Job:
        """Raises ConfigError if there is no such job."""
        _check_id(job)
        with self._asking():
            return _job(self.client.get_job_info(job))

    def logs(self, job: str) -> str:
        """All that it has written so far, stdout and stderr as they came."""
        _check_id(job)
        with self._asking():
            return str(self.client.get_job_logs(job))

    def stop(self, job: str) -> bool:
        """Ask a job to end (SIGTERM, and SIGKILL GRACE_S later); False if it was over already."""
        if self.get(job).is_over:
            return False
        with self._asking():
            return bool(self.client.stop_job(job))

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        """Write what a job has written and writes, until it is over.

        A connection that breaks is made again, and nothing is written twice.

        Raises:
            UnreachableError: the cluster does not answer any more.
        """
        from aiohttp import ClientError

        written = 0

        async def tail() -> None:
            nonlocal written
            seen = 0
            async for text in self.client.tail_job_logs(job):
                write(text[max(0, written - seen) :])
                seen += len(text)
                written = max(written, seen)

        self.get(job)
        while True:
            with contextlib.suppress(ClientError, RuntimeError, OSError):
                asyncio.run(tail())
            state = self.get(job)
            if state.is_over:
                return state
            time.sleep(LOOK_S)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Ray's errors as ours."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UnreachableError(f"{self.url}: {error}") from error
        except (OSError, RuntimeError, ValueError) as error:
            text = str(error)
            if "status code 404" in text:
                raise ConfigError(f"{self.url}: there is no such job. See: setwise jobs ls") from error
            if "already exists" in text:
                raise ConfigError(f"{self.url}: a job of this name exists; choose another --name") from error
            if isinstance(error, OSError):
                raise UnreachableError(f"{self.url} does not answer: {text}") from error
            raise SetwiseError(f"{self.url}: {text.strip()}") from error


def connect(address: str | None = None) -> Jobs:
    """The jobs of the cluster at `address`, after a look at whether it is one that can take ours.

    Args:
        address: http://HOST:8265, or HOST:PORT as RAY_ADDRESS has it; None means RAY_ADDRESS.

    Raises:
        ConfigError: no address was given, or Python or Ray are of other versions there.
        UnreachableError: nothing answers, or the token is not accepted.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError("which cluster? Give --address http://HOST:8265, or set RAY_ADDRESS")
    if not address.startswith(("http://", "https://")):
        address = _dashboard(address)
    url = address.rstrip("/")
    mode = str(ask(url, "/api/authentication_mode").get("authentication_mode", "disabled"))
    if mode == "token" and not token():
        raise UnreachableError(f"{url} asks for a token and there is none here. {WHERE_A_TOKEN_GOES}")
    answer = ask(url, "/api/v0/cluster_metadata")
    metadata = answer.get("data") or {}
    compare_versions(url, str(metadata.get("pythonVersion", "")), str(metadata.get("rayVersion", "")))

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _without_address():
            client = JobSubmissionClient(url, headers=_headers())
    except (AuthenticationError, OSError, RuntimeError) as error:
        raise UnreachableError(f"{url}: {error}") from error
    return Jobs(url, client, warning_about(url, mode))


def compare_versions(url: str, their_python: str, their_ray: str) -> None:
    """Raises ConfigError where a cluster has another Python or Ray than this process, by their first two numbers."""
    ours = {"Python": platform.python_version(), "Ray": importlib.metadata.version("ray")}
    theirs = {"Python": their_python, "Ray": their_ray}
    if any(ours[name].split(".")[:2] != theirs[name].split(".")[:2] for name in ours):
        here, there = (", ".join(f"{name} {side[name] or '?'}" for name in side) for side in (ours, theirs))
        raise ConfigError(f"{url} has {there}; here is {here}. Use an environment with the versions of the cluster")


def command_line(words: Sequence[str]) -> str:
    """The command of a job, for the shell that Ray starts it by; the shell becomes the command, and so hears signals
    and ends with the command's own exit code."""
    return "exec python -m " + shlex.join(words)


def public_environment(names: Sequence[str]) -> dict[str, str]:
    """Values of environment variables that may go along with a job.

    Raises:
        ConfigError: one is not set, or looks like a secret by its name or by what it holds.
    """
    found = {}
    for name in names:
        if name not in os.environ:
            raise ConfigError(f"{name} is not set in this environment")
        if SECRET_NAME.search(name):
            raise ConfigError(f"{name} looks like a secret and is not sent. {READ_BY_ALL}.")
        if holds_secret(os.environ[name]):
            raise ConfigError(
                f"{name} holds a password, or what a secret variable does, and is not sent. {READ_BY_ALL}."
            )
        found[name] = os.environ[name]
    return found


def token() -> str | None:
    """The token that Ray would send, if there is one here."""
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return value
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH names {named}: {error.strerror}") from error
        return None


def ask(url: str, path: str) -> dict[str, Any]:
    """The JSON object that a dashboard answers within some seconds.

    Raises:
        UnreachableError: there is no answer, or no such one, or the token is wrong.
    """
    try:
        request = urllib.request.Request(url + path, headers=_headers())
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        reason = "the token is not the cluster's" if error.code in (401, 403) else f"HTTP {error.code}"
        raise UnreachableError(f"{url}{path}: {reason}") from error
    except (OSError, ValueError) as error:
        raise UnreachableError(
            f"no Ray dashboard at {url}: {getattr(error, 'reason', error)}. "
            "Is the cluster up, and does the address reach its head's port 8265 (perhaps through a tunnel)?"
        ) from error
    if not isinstance(answer, dict):
        raise UnreachableError(f"{url} is no Ray dashboard")
    return answer


def _headers() -> dict[str, str]:
    """Ray's client sends a token by itself only where RAY_AUTH_MODE says so."""
    known = token()
    return {"Authorization": f"Bearer {known}"} if known else {}


def _dashboard(address: str) -> str:
    """The URL of the dashboard of the cluster at HOST:PORT, as its head tells."""
    parts = urlsplit(f"//{address}")
    if "://" in address or (address != "auto" and not (parts.hostname and parts.port)):
        raise ConfigError(f"'{address}' is no address of a cluster: give http://HOST:8265")
    if token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.exceptions import RayError

    try:
        if address != "auto":  # Ray would try for minutes
            socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=PATIENCE_S).close()
        with _without_address():
            return str(get_address_for_submission_client(address))
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise UnreachableError(f"no Ray cluster at {address}: {error}") from error


@contextlib.contextmanager
def _without_address() -> Iterator[None]:
    """Ray prefers these variables to the address it is given."""
    before = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def warning_about(url: str, mode: str) -> str | None:
    """What to know of a dashboard off this machine that asks for no token (`mode` of its authentication)."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return None
    if mode == "token" or host == "localhost":
        return None
    return (
        f"{url} is not this machine and asks for no token: whoever reaches that port can run any command on the "
        "cluster and read what you send. Start Ray there with RAY_AUTH_MODE=token"
    )


def _check_id(job: str) -> None:
    if not ID.fullmatch(job):
        raise ConfigError(f"'{job}' is no id of a job. See: setwise jobs ls")


def _job(details: Any) -> Job:
    return Job(
        id=str(details.submission_id),
        status=str(getattr(details.status, "value", details.status)),
        command=details.entrypoint,
        message=details.message or "",
        driver_code=details.driver_exit_code,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )
