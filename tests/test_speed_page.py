"""The page on speed shows what the result files hold."""

import re

import pytest
from train_helpers import ROOT

from experiments import results, speed

PAGE = (ROOT / "experiments" / "docs" / "speed.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\(`(speed-[\w-]+)`\)", PAGE)


@pytest.mark.parametrize("name", NAMED)
def test_tables_are_those_of_the_files(name):
    assert speed.table(results.read(results.DIRECTORY / f"{name}.json")) in PAGE


def test_all_files_are_shown():
    assert sorted(NAMED) == sorted(path.stem for path in results.DIRECTORY.glob("speed-*.json"))
