"""Rewrite tests/goldens/*.txt from what the passes do now; read the difference before you commit it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write every golden whose passes make something else of its graph."""
    sys.path.insert(0, str(ROOT))
    from tests.passes.goldens import goldens

    for golden in goldens():
        text = golden.text()
        if golden.path.read_text(encoding="utf-8") != text:
            golden.path.write_text(text, encoding="utf-8")
            print(f"written {golden.path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
