"""Secrets kept out of what leaves the process: messages, logs, tracebacks, and the record that a run keeps.

A secret is the password in an address, or the value of an environment variable whose name says that it is one.
"""

from __future__ import annotations

import json
import logging
import os
import re
from urllib.parse import quote, quote_plus, unquote

SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|PWD|CREDENTIAL|AUTH(?!OR)|(^|_)(API|ACCESS|PRIVATE)?_?KEY", re.I
)
PLACE_NAME = re.compile(r"(_PATH|_FILE|_DIR|_SOCK|_MODE)$|^(OLD)?PWD$", re.I)
"""Ends the name of a variable that says where a secret is, or how it is used, and holds none."""
MIN_LENGTH = 8
WORD = re.compile(r"[A-Za-z]{1,15}")
"""Such a value, or one shorter than MIN_LENGTH, may be an ordinary word, and stays where it stands alone in a text."""
HIDDEN = "***"

# Up to the last '@': a password may hold one. With http no '/', where the path begins; a token may stand for the user.
PASSWORDS = (
    re.compile(r"""(\bhttps?://[^/\s@:]*:)([^/\s'"]{0,500})@""", re.I),
    re.compile(r"""(\b(?!https?:)[a-z][\w+.-]{0,30}://[^/\s@:]*:)([^\s'"]{0,500})@""", re.I),
    re.compile(r"""(\bhttps?://)([^/\s@:'"]{20,500})@""", re.I),
)


def masked(text: str) -> str:
    """`text` as others may read it: `***` stands for each secret."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern in PASSWORDS:
        text = pattern.sub(rf"\1{HIDDEN}@", text)
    return text


def holds_secret(text: str) -> bool:
    return masked(text) != text


class Formatter(logging.Formatter):
    """Lines of a log, with their tracebacks, masked."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def _secrets() -> set[str]:
    """The secrets in this process's environment, also as they are written in addresses and in JSON."""
    found = set()
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and not PLACE_NAME.search(name) and not _is_place(value):
            found.add(value)
        for pattern in PASSWORDS:
            for address in pattern.finditer(value):
                found |= {address[2], unquote(address[2])}
    written = {
        form for value in found for form in (value, quote(value, ""), quote_plus(value), json.dumps(value)[1:-1])
    }
    return {form for form in written if len(form) >= MIN_LENGTH and not WORD.fullmatch(form)}


def _is_place(value: str) -> bool:
    return os.path.exists(value)  # noqa: PTH110  # Path.exists raises where a value is too long for a name
