"""Rewrite tests/goldens/*.txt from what the passes do now; read the difference before you commit it.

With --contracts also the table of what each pass changes on each model (minutes).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write every golden whose passes make something else of its graph now."""
    sys.path.insert(0, str(ROOT))
    from tests.passes import contracts
    from tests.passes.goldens import goldens

    for golden in goldens():
        _write(golden.path, golden.text())
    if "--contracts" in sys.argv[1:]:
        _write(contracts.TABLE, contracts.table())


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(f"written {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
