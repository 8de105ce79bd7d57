"""What command lines share: how they end, and names that stand for modules."""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn


def modules(package: ModuleType) -> dict[str, str]:
    """The modules of a package, and the first line of what each tells of itself, read without running any."""
    files = sorted(path for path in Path(package.__path__[0]).glob("*.py") if not path.stem.startswith("_"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    return {name: (text or "").partition("\n")[0] for name, text in docs.items()}


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command line and exits with what it returns, or with 130 if it is interrupted."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, and the same command can be given again", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # the compiler's threads may be at work, and would crash an orderly exit
    sys.exit(status)
