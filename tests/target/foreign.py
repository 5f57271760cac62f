"""Targets as another package brings them."""

from __future__ import annotations

from qcompile.target.target import Target

TARGETS = (Target("mine", "a target of another package", ("w8a8",)),)
