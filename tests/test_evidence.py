"""The page of all comparisons."""

import dataclasses
import re

import test_ablate

from experiments import ablate, ablations, evidence, results
from experiments.command import modules

options = test_ablate.options


def test_the_page_is_that_of_the_committed_results():
    """To write it again: `python -m experiments.evidence`."""
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert text == evidence.page()
    for figure in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (evidence.PAGE.parent / figure).exists()


def test_every_row_has_its_claim_and_what_is_measured(options, compile_cache, monkeypatch):
    assert evidence.measured("arithmetic", options.output) == {}
    text = evidence.page(options.output)
    assert all(f"[{name}](#{name})" in text and f"\n## {name}\n" in text for name in modules(ablations))
    assert "Size `cpu`" not in text
    ablate.run("arithmetic", dataclasses.replace(options, arms=("LIMe",)))
    text = evidence.page(options.output)
    assert text.count("Size `cpu`") == 1
    assert "| cpu 2 of 6" in text
    assert "LIMe, level 2 (2 seeds)" in text
    assert "    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.ablate arithmetic --size cpu\n" in text


def test_no_result_is_of_an_arm_that_is_gone():
    """A run that no comparison shows would be forgotten."""
    for name in modules(ablations):
        for size in ablate.load(name).SIZES:
            arms = ablate.load(name).arms(size)
            for file in (results.DIRECTORY / f"{name}-{size}").glob("*.json"):
                assert file.stem.rpartition("-")[0] in arms, file
