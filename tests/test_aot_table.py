"""The table of what was compiled: its rows, its verdicts, and the page that shows it."""

import dataclasses

import pytest

from experiments import aot, aot_table

BSWA = {
    "peak_gib": [10.0],
    "usable_gib": [15.75],
    "collective_gb": [100.0],
    "fam_scan_moves": [0],
    "flops": [1000],
    "forward_flops": [1001],
    "forward_formula": [1000],
}


def test_every_row_can_be_compiled_and_has_a_file_of_its_own():
    rows = list(aot_table.rows())
    assert len({aot.result_name(row) for row in rows}) == len(rows) == 19
    for row in rows:
        config = aot.train_config(row)
        assert config.data.batch_size % aot_chips(row) == 0 or row.what != "train"
    lime = next(row for row in rows if row.lime)
    words = aot_table.command(lime, aot_table.DIRECTORY)
    assert words[words.index("--microbatch") + 1] == "16"
    assert "--lime" in words


def aot_chips(row):
    chips = 1
    for side in row.topology.partition(":")[2].split("x"):
        chips *= int(side)
    assert row.microbatch is None or row.microbatch % chips == 0
    return chips


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "yes"),
        ({"peak_gib": [14.2]}, "peak over 90%, peak over 1.35"),
        ({"peak_gib": [13.4]}, "yes"),
        ({"collective_gb": [160.1]}, "bytes over 1.6"),
        ({"flops": [1061]}, "operations over 1.06"),
        ({"fam_scan_moves": [1]}, "the FAM scan moves arrays"),
        ({"forward_flops": [985]}, "the forward count is not the formula's"),
    ],
)
def test_verdicts(change, verdict):
    assert aot_table.verdict(BSWA | change, BSWA) == verdict


def test_bswa_has_nothing_to_be_compared_with():
    assert aot_table.verdict(BSWA | {"flops": [2000]}, None) == "yes"


def test_the_page_shows_the_results():
    text = aot_table.PAGE.read_text()
    found = aot_table.read(aot_table.DIRECTORY)
    assert aot_table.page(text, found) == text
    for result in found:
        row = aot.Options(**result.config["aot"])
        assert aot.result_name(dataclasses.replace(row, name=None)) == result.name
        assert f"{result.values['curves'][0]['peak_gib'][0]:.2f}" in text
