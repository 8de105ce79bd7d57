"""The notebooks: as committed they have been executed, and their cells run as they stand, with smaller settings."""

import json
import logging
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "notebooks"
# In place of the cell that is tagged "parameters".
SMALL = {
    "fam": {"STEPS": 3, "BLOCKS": (4,), "LENGTHS": (4, 6), "TRIALS": 4},
    "lime": {"STEPS": 3, "LENGTH": 32, "BATCH": 4, "TEXTS": 8},
}


def cells_of(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def test_all_notebooks_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_committed_outputs_are_whole_and_small(name):
    """To make them again: `jupyter execute --inplace experiments/notebooks/NAME.ipynb`."""
    code = [cell for cell in cells_of(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    assert max(map(len, pictures)) < 100_000
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data"), output  # no errors, no values left to show
        assert output.get("name", "stdout") == "stdout", output  # no warnings
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.:/])/(?:tmp|root|home|work|usr|opt|mnt|var|Users)/[^\"\\]*", text)
    for link in re.findall(r"\]\(((?:\.\./)*[\w./-]+)\)", text):
        assert (FOLDER / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_cells_run_with_smaller_settings(name, tmp_path, monkeypatch, compile_cache):
    here = tmp_path / "experiments" / "notebooks"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    level = logging.getLogger("absl").level
    names: dict = {}
    try:
        for number, cell in enumerate(cells_of(name)):
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", ()):
                exec(source, names)
                assert set(SMALL[name]) == {key for key in names if key.isupper()}
                names |= SMALL[name]
            elif cell["cell_type"] == "code":
                exec(compile(source, f"{name}.ipynb, cell {number}", "exec"), names)
    finally:
        logging.getLogger("absl").setLevel(level)
        plt.close("all")
    assert (tmp_path / "runs").is_dir()
