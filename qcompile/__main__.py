"""`python -m qcompile` and `qcompile`: an interrupt is one line from the first moment on."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from qcompile.cli.app import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was written\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # modules that are half imported print more on their way out


if __name__ == "__main__":
    sys.exit(main())
