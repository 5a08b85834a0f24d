"""What others may read holds no secret, and is otherwise as it was."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from setwise.platform import masking
from setwise.platform.masking import masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:canary@host:5000/x", "https://me:***@host:5000/x"),
        ("at http://me:c@nary@host.", "at http://me:***@host."),
        ("postgresql+psycopg://me:ca/na@ry@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("redis://:canary@host:6379/0", "redis://:***@host:6379/0"),
        ("git clone https://ghp_canary0123456789canary@host/x.git", "git clone https://***@host/x.git"),
        ("a='mysql://u:canary@h/d' b=\"mysql://v:canary@h/d\"", "a='mysql://u:***@h/d' b=\"mysql://v:***@h/d\""),
        ("POSTGRESQL://me:canary@host/db (1 of 2)\nme:x@y", "POSTGRESQL://me:***@host/db (1 of 2)\nme:x@y"),
    ],
)
def test_a_password_in_an_address_is_hidden(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown and masking.holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://127.0.0.1:5000/#/experiments/1?who=me@example.org",
        "https://somebody@host/x.git, git@host:a/b.git, ssh://git@host:22/x",
        "sqlite:////store/mlflow.db and s3://bucket/a@b",
        "postgresql://setwise@10.0.0.1/optuna",
        "12:30 a@b.c http://h:80/ d@e",
    ],
)
def test_what_holds_none_is_left_alone(text: str) -> None:
    assert masked(text) == text and not masking.holds_secret(text)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD", "RAY_AUTH_TOKEN", "MY_API_KEY"])
@pytest.mark.parametrize("value", ["canary12", "/wJalr+XUt/can=ary", 'can"ary\\\n0123', "canarÿ canary"])
def test_the_value_of_a_secret_variable_is_hidden_however_it_is_written(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for form in (value, quote(value, safe=""), json.dumps({"a": value})):
        shown = masked(f"before {form} after")
        assert "***" in shown and form not in shown
        assert shown.startswith("before ") and shown.endswith(" after")


def test_the_password_of_an_address_in_the_environment_is_hidden_by_itself_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETWISE_OPTUNA_URL", "postgresql://me:pass%2Fw%40rd@host/db")
    assert masked("could not log in with pass/w@rd (pass%2Fw%40rd)") == "could not log in with *** (***)"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PWD", str(Path(__file__).parent)),
        ("RAY_AUTH_TOKEN_PATH", "/nowhere/token"),
        ("RAY_AUTH_MODE", "disabled"),
        ("GIT_AUTHOR_NAME", "somebody"),
        ("HOSTNAME", "machine-of-mine"),
        ("API_KEY", "short"),
        ("API_KEY", ""),
    ],
)
def test_what_is_no_secret_stays_readable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    text = f"there is nothing at {value}"
    assert masked(text) == text


def test_a_logged_traceback_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary0123")
    try:
        int("canary0123")
    except ValueError:
        record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "at %s", ("http://a:canary@b",), sys.exc_info())
    line = masking.Formatter("%(message)s").format(record)
    assert (
        line.startswith("at http://a:***@b\n")
        and "ValueError: invalid literal for int() with base 10: '***'" in line
        and "canary" not in line
    )


def test_a_long_text_takes_no_longer_for_what_is_in_it() -> None:
    text = "a.b+c-d://e:" * 20_000
    began = time.process_time()
    assert masked(text) == text
    assert time.process_time() - began < 10, "0.7 s were measured; without a limit to a password it is an hour"
