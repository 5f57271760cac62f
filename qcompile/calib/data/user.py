"""Functions of the user's own Python files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from qcompile.errors import DataError


def user_function(path: Path, name: str) -> Callable[..., Any]:
    """The function `name` of the file at `path`, which is imported: only for what the command line names.

    Raises:
        DataError: there is no such file or function, or the file fails.
    """
    if not path.is_file():
        raise DataError(f"no file {path}: check the path before ':{name}'")
    spec = importlib.util.spec_from_file_location(f"qcompile_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever the user's file raises
        raise DataError(f"{path} failed while being imported ({type(e).__name__}: {e}); run it with python first") from e
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{path} defines no function {name!r}; it has {[n for n in vars(module) if not n.startswith('_')]}")
    return cast(Callable[..., Any], function)
