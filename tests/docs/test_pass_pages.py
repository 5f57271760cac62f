"""Figures on pages of passes are rows of passes-compared.md."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

MEASURED = tomllib.loads((ROOT / "docs" / "passes" / "measured.toml").read_text(encoding="utf-8"))


def compared() -> Iterator[tuple[tuple[str, ...], float]]:
    """(model, variant, scheme, pipeline) -> dB."""
    head: list[str] = []
    for line in (ROOT / "docs" / "guide" / "passes-compared.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[5].replace(".", "").replace("-", "").isdigit():
            head = cells[:3] if cells[0] else head
            yield (*head, cells[4]), float(cells[5])


@pytest.mark.parametrize("name", MEASURED)
def test_figures_are_measured_ones(name: str) -> None:
    row, table = MEASURED[name], dict(compared())
    key = (row["model"], row["variant"], row["scheme"])
    assert (row["without"], row["with"]) == (table[*key, "none"], table[*key, name])
