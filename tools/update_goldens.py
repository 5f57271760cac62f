"""Rewrite tests/goldens/*.txt from what the passes do now; read the difference before you commit it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write every golden that differs, remove those without a case."""
    sys.path.insert(0, str(ROOT))
    from tests.passes.goldens import FOLDER, GOLDENS

    FOLDER.mkdir(exist_ok=True)
    wanted = {g.path: g.text() for g in GOLDENS}
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"written {path.relative_to(ROOT)}")
    for path in set(FOLDER.glob("*.txt")) - set(wanted):
        path.unlink()
        print(f"removed {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
