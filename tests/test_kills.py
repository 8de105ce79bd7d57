"""A run that is killed again and again, by the script that shows that it ends as if nobody had killed it."""

import numpy as np
import pytest

from experiments import kills, report, results
from experiments.kills import KillsError, Options, compare

SHORT = {"kills": 3, "steps_per_kill": 16, "checkpoint_every": 4}


@pytest.mark.slow
def test_killed_at_a_random_moment_and_while_saving(tmp_path):
    result, file = kills.run(Options(**SHORT, output=tmp_path, work_dir=tmp_path / "work"))
    values = results.read(file).values
    anywhere, saving = values["curves"]
    assert (anywhere["kill"], saving["kill"]) == ([1, 3], [2])
    assert saving["saving"][0] > saving["resumed"][0]  # it went on from the one before
    assert values["while_saving"] >= 1
    assert values["lines_compared"] > 64  # all of the last process, and what those before it had made
    assert {"params.embed", "rest.rsp.fam", "rest.stream.segment_k", "rest.key"} <= set(values["arrays"])
    assert "at a random moment" in report.table(result)
    # What the comparison is meant to cover has been at work.
    run = kills.Run(Options(**SHORT), tmp_path / "work", "killed")
    assert run.last_step() == 64
    assert all(np.isfinite(row["loss"]) and not row["skipped"] for row in run.rows())
    assert any(row["grad_norm/fam_prompt"] > 0 for row in run.rows())
    assert run.config.model.memory.rsp == 0.8


def test_a_difference_is_found():
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    assert compare(rows[:2], rows, "after kill 1") == 2
    other = [rows[0], rows[1] | {"loss": float(np.nextafter(0.5, 1))}]
    with pytest.raises(KillsError, match=r"after kill 1, line 2 .* differs .*: loss is 0.5000000000000001, not 0.5"):
        compare(other, rows, "after kill 1")
    with pytest.raises(KillsError, match="line 4 of the metrics differs"):
        compare([*rows, rows[0]], rows, "at the end")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kills": 0}, "kills=0 is not allowed; it must be at least 1"),
        ({"steps_per_kill": 7}, r"steps_per_kill=7 is not allowed; it must be at least twice checkpoint_every=10"),
    ],
)
def test_wrong_options(settings, message):
    with pytest.raises(ValueError, match=message):
        Options(**settings)


def test_a_folder_that_is_in_use(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty; give another folder"):
        kills.run(Options(output=tmp_path / "out", work_dir=tmp_path))
