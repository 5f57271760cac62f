"""Everything that qcompile raises on purpose.

    QcompileError                 exit code
    |-- UsageError                2   the command, a pass string or an option is wrong
    |-- InputError                3   the model or the data cannot be used
    |   |-- ModelError            3   ... the ONNX model
    |   `-- DataError             3   ... the calibration or evaluation data
    |-- BackendError              4   a backend is missing or failed
    |   `-- BuildError            4   ... the builder refused the model, or crashed on it
    `-- GateError                 1   a check or gate did not hold
        `-- VerifyError           1   a pass broke its contract

A message says what is wrong and ends with what to do.  Anything else that reaches the user is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QcompileError(Exception):
    """Base of all errors meant for the user; `exit_code` is the process's exit status."""

    exit_code = 1


class UsageError(QcompileError):
    """The command line, a pipeline string or an option is wrong."""

    exit_code = 2


class InputError(QcompileError):
    """The model or the data cannot be used."""

    exit_code = 3


class ModelError(InputError):
    """The ONNX model cannot be used."""


class DataError(InputError):
    """The calibration or evaluation data cannot be used."""


class BackendError(QcompileError):
    """A backend (TensorRT, TensorRT-RTX, a provider) is missing or failed."""

    exit_code = 4


class BuildError(BackendError):
    """The engine builder refused the model, or crashed on it."""


class GateError(QcompileError):
    """A check or gate did not hold."""


class VerifyError(GateError):
    """A pass broke the contract of its kind."""


def near(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'x'?` or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=2, cutoff=0.5)
    return f", did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
