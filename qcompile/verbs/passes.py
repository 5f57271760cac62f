"""`qcompile passes`: all passes, presets and default pipelines, or one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompile.pipeline import registry
from qcompile.pipeline.describe import OptionHelp, PassHelp, describe_pass, describe_passes
from qcompile.report import SCHEMA_VERSION

__all__ = ["Listing", "OnePass", "OptionHelp", "PassHelp", "list_passes", "show_one"]


@dataclass(frozen=True)
class Listing:
    """Every pass; presets and what runs without --passes, by name."""

    passes: tuple[PassHelp, ...]
    presets: Mapping[str, str]
    defaults: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """`schema_version, passes, presets, defaults`."""
        passes = [p.to_json() for p in self.passes]
        return {
            "schema_version": SCHEMA_VERSION, "passes": passes, "presets": dict(self.presets), "defaults": dict(self.defaults)
        }  # fmt: skip


@dataclass(frozen=True)
class OnePass:
    """One pass in full."""

    described: PassHelp

    def to_json(self) -> dict[str, Any]:
        """`schema_version` and the pass's keys."""
        return {"schema_version": SCHEMA_VERSION, **self.described.to_json()}


def list_passes() -> Listing:
    """Everything that can be written in a pipeline."""
    return Listing(tuple(describe_passes()), registry.PRESETS, registry.defaults())


def show_one(name: str) -> OnePass:
    """One pass by name.

    Raises:
        UsageError: there is no such pass; near names are suggested.
    """
    return OnePass(describe_pass(name))
