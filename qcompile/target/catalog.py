"""The targets: found in the folders beside this file, and in other packages by entry point.

A folder `NAME/` with a module `target` in it that holds `TARGETS`, a tuple of `Target`, is all that a target is.  Another
package names such a module under the entry point group `qcompile.targets`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path

from qcompile.errors import UsageError
from qcompile.target.target import Target

ENTRY_POINT_GROUP = "qcompile.targets"
DEFAULT = "trt"


class Catalog(Mapping[str, Target]):
    """Targets by name, ours first; read when the first is asked for."""

    def __getitem__(self, name: str) -> Target:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, target: Target) -> str:
        """Take in a target that no folder holds (a variant, for a study); returns its name.

        Raises:
            UsageError: the name is taken.
        """
        if target.name in self._found:
            raise UsageError(f"there is a target {target.name!r} already; give the variant a name of its own")
        self._found[target.name] = target
        return target.name

    @cached_property
    def _found(self) -> dict[str, Target]:
        own = [f"{__package__}.{m.name}.target" for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.ispkg]
        others = [e.value for e in entry_points(group=ENTRY_POINT_GROUP)]
        found = [t for module in (*own, *others) for t in _targets(module)]
        return {t.name: t for t in sorted(found, key=lambda t: t.name != DEFAULT)}


TARGETS = Catalog()


def engine_targets() -> list[str]:
    """Names of the targets that engines are built for."""
    return [t.name for t in TARGETS.values() if t.engine is not None]


def _targets(module: str) -> tuple[Target, ...]:
    try:
        found = importlib.import_module(module).TARGETS
    except (ImportError, AttributeError) as e:
        raise UsageError(f"targets {module!r} cannot be imported ({e}); reinstall the package that provides them") from e
    if not all(isinstance(t, Target) for t in found):
        raise UsageError(f"{module!r} holds no qcompile targets; correct the entry point of the package that provides it")
    return tuple(found)
