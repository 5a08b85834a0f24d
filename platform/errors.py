"""The errors a user can meet, each with the exit code that scripts may rely on.

A message says what was wrong, where, what is allowed and what to do. Whoever raises one of these has looked at the
user's situation; every other exception is a defect of ours and keeps its traceback.
"""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it: 128 + SIGINT."""


class SetwiseError(Exception):
    """Failed while running."""

    exit_code = 1


class DivergedError(SetwiseError):
    """A loss is not a finite number any more."""


class ConfigError(SetwiseError):
    """The command line or a configuration is wrong; nothing was started."""

    exit_code = 2


class GateError(SetwiseError):
    """A promotion gate was not met; nothing was changed."""

    exit_code = 3


class TrialsFailedError(SetwiseError):
    """A sweep went to its end, but some of its trials failed."""

    exit_code = 4


class DataError(SetwiseError):
    """Data, or a checkpoint, is missing or damaged."""

    exit_code = 5


class StorageError(SetwiseError):
    """The store cannot be written: full, read-only, or gone. What was whole before it still is."""


class UnreachableError(SetwiseError):
    """The cluster, the tracking server, or where published weights are to come from, cannot be reached."""

    exit_code = 6


class StoppedError(SetwiseError):
    """A training stopped between two steps, since it was asked to; its checkpoint is written."""

    exit_code = INTERRUPTED
