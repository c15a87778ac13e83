"""The packages that the programs need, for one who has forgotten to activate `.venv`."""

import importlib.util
import os
import sys

PACKAGES = ("numpy", "PIL", "tensorflow")  # without which no program starts, by the names of their modules


def check_packages() -> None:
    """Ends the program with a sentence and exit status 2 if this Python lacks a package, before an import fails."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
        print(
            f"{os.path.basename(sys.argv[0])}: this Python, {sys.executable}, lacks {', '.join(missing)}; use the one "
            f"that python3 start.py sets up: {activate}",
            file=sys.stderr,
        )
        raise SystemExit(2)
