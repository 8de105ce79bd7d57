"""What command lines share: how they end, names that stand for modules, and folders for what they write."""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from experiments.files import is_remote


def modules(package: ModuleType) -> dict[str, str]:
    """The modules of a package, and the first line of what each tells of itself, read without running any."""
    files = sorted(path for path in Path(package.__path__[0]).glob("*.py") if not path.stem.startswith("_"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    return {name: (text or "").partition("\n")[0] for name, text in docs.items()}


def make_folder(folder: Path, option: str) -> Path:
    """Makes a folder for files to come, with those above it, unless it is there.

    Args:
        folder: Its path.
        option: What the caller calls it, for the message.

    Raises:
        ValueError: A file is in the way, or it cannot be made or written to.
    """
    if is_remote(folder):
        return folder  # there are no folders; whether it may be written to shows with the first file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "it may not be written to"
    except (FileExistsError, NotADirectoryError):
        paths = (folder, *folder.parents)
        reason = f"{next(path for path in paths if os.path.lexists(path) and not path.is_dir())} is no folder"
    except OSError as error:
        reason = str(error.strerror)
    if reason is not None:
        raise ValueError(f"{option}={str(folder)!r} cannot be used: {reason}; give another folder")
    return folder


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
