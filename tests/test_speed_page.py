"""The page on speed shows what the result files hold."""

import re

import pytest
from train_helpers import ROOT

from experiments import parts, results, speed

PAGE = (ROOT / "experiments" / "docs" / "speed.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\(`((?:speed|parts)-[\w-]+)`\)", PAGE)


@pytest.mark.parametrize("name", NAMED)
def test_tables_are_those_of_the_files(name):
    result = results.read(results.DIRECTORY / f"{name}.json")
    assert {"speed": speed, "parts": parts}[result.kind].table(result) in PAGE


def test_all_files_are_shown():
    files = [path.stem for kind in ("speed", "parts") for path in results.DIRECTORY.glob(f"{kind}-*.json")]
    assert sorted(NAMED) == sorted(files)
