"""The quickstart from its first step to its last line, a few steps of each model."""

import json

import pytest

from experiments import quickstart, report, results


@pytest.mark.slow
def test_smoke_run_ends_with_table_figures_and_results_and_goes_on_when_started_again(tmp_path, capsys):
    options = quickstart.Options(work_dir=tmp_path, smoke=True)
    said = []
    table = quickstart.run(options, say=said.append)
    passkey, text = (results.read(tmp_path / f"quickstart-{name}.json") for name in ("passkey", "text"))

    assert [curve["label"] for curve in passkey.values["curves"]] == ["FAM", "FAM, memory zeroed", "window only"]
    assert all(curve["blocks"] == [4, 8] for curve in passkey.values["curves"])
    (curve,) = text.values["curves"]
    measured = [loss for loss in curve["loss"] if loss is not None]
    assert min(measured) > 0
    assert max(measured) < 8  # bytes, after four steps
    assert text.values["sample"]["text"]
    assert text.data["packages"]
    # Heading, rule, six accuracies, and a line per measured position.
    assert len(table.splitlines()) == 2 + 6 + len(measured)
    assert report.table(passkey) in "\n".join(said)
    for name in ("passkey", "text"):
        file = tmp_path / f"quickstart-{name}.png"
        assert file.read_bytes().startswith(b"\x89PNG")
        assert str(file) in "\n".join(said)

    runs = {run: (tmp_path / run / "metrics.jsonl").read_text() for run in ("passkey", "passkey_bswa", "lm")}
    assert all(json.loads(lines.splitlines()[-1])["step"] == 4 for lines in runs.values())
    capsys.readouterr()
    assert quickstart.run(options, say=lambda line: None) == table
    assert {run: (tmp_path / run / "metrics.jsonl").read_text() for run in runs} == runs
    assert "a new run" not in capsys.readouterr().out
