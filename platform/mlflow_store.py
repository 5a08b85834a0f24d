"""How an MLflow store is called: a call fails soon, and who made it decides when to try again.

Left to itself MLflow tries for four minutes to reach a server, and for a minute and a half to reach a database.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from setwise.platform import storage
from setwise.platform.errors import UnreachableError
from setwise.platform.masking import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
CALL_S = 10  # until a call to a server counts as failed
MAKING_S = 120  # for another process to make the tables of a new store
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def limit_calls() -> None:
    """Limit the calls of this process, where its environment does not say otherwise; MLflow looks there each time."""
    os.environ.setdefault(TIMEOUT, str(CALL_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("PGCONNECT_TIMEOUT", str(CALL_S))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for a verb's result


@contextlib.contextmanager
def call_limit(seconds: float) -> Iterator[None]:
    """Let a call take this long, if the limit is shorter. A server that hands a large file on answers late."""
    before = os.environ[TIMEOUT]
    os.environ[TIMEOUT] = str(max(int(before), int(seconds)))
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def open_client(uri: str) -> MlflowClient:
    """A client of the store, which has answered. Importing MLflow and creating its tables take seconds.

    Raises:
        UnreachableError: it did not answer, or has no driver here.
    """
    for noisy in ("alembic", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it logs it raises too
    if uri.startswith("sqlite:///") and "?" not in uri:
        try:
            _make_whole(Path(uri.removeprefix("sqlite:///")))
        except Exception as error:
            raise unreachable(uri, error) from error
    if is_database(uri):
        _connect_once(uri)
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        raise unreachable(uri, error) from error
    return client


def _make_whole(file: Path) -> None:
    """Make a sqlite store with all its tables, or nothing. A process that is killed while MLflow makes them one by one
    would leave a file that nobody can ever open."""
    if _is_something(file):
        return
    from mlflow import MlflowClient

    with storage.lease(file.with_name(f".{file.name}.lease"), f"the making of {file}", wait_s=MAKING_S):
        if _is_something(file):
            return
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            making = Path(folder) / file.name
            MlflowClient(tracking_uri=f"sqlite:///{making}", registry_uri=f"sqlite:///{making}").search_experiments()
            making.replace(file)


def _is_something(file: Path) -> bool:
    return file.exists() and (not file.is_file() or file.stat().st_size > 0)


def _connect_once(uri: str) -> None:
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
        engine.connect().close()
        engine.dispose()
    except ImportError as error:
        hint = "postgresql://... needs: pip install 'setwise[postgres]'"
        raise UnreachableError(masked(f"tracking store {uri}: {error}; {hint}")) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise unreachable(uri, error) from error


def is_database(uri: str) -> bool:
    """Whether we write to a database ourselves; else a server does."""
    return re.split("[:+]", uri)[0] in DATABASES


def unreachable(uri: str, error: Exception) -> UnreachableError:
    if "ConnectionPool" not in str(error):
        return UnreachableError(masked(f"tracking store {uri}: {error}"))
    found = re.search(r"\[Errno -?\d+\] ([^\"')]+)|timed out", str(error))
    reason = "no answer" if found is None else found[1] or found[0]
    hint = "Is the server running, and MLFLOW_TRACKING_URI its address?"
    return UnreachableError(masked(f"tracking store {uri} does not answer ({reason}). {hint}"))


def is_away(error: Exception) -> bool:
    """Whether a store did not answer, or said that it cannot for now; else it refused what was asked of it."""
    from requests import RequestException

    code = getattr(error, "error_code", None)
    return code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE") or isinstance(
        error, RequestException | ConnectionError | TimeoutError
    )
