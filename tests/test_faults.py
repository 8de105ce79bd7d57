"""What several processes do when one of them, a file or a number is not as it should be; each produced on purpose."""

import dataclasses
import signal
import time

import pytest
from test_distributed import PROCESS, Job, assert_same_metrics, tiny_job
from train_helpers import metric_rows, restore, with_model

from experiments import distributed
from experiments.optim import OptimConfig
from experiments.train import train

pytestmark = pytest.mark.usefixtures("compile_cache")

# The function NAME of the training loop sleeps at its call COUNT in process NUMBER; from then on the others wait no
# longer than 8 s. Before, they may compile.
_STUCK = """
import sys, time
import experiments.loop
from experiments import distributed

name, count, number = {name!r}, {count}, {number}
true, calls = getattr(experiments.loop, name), []

def stuck(*args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        if sys.argv[sys.argv.index("--distributed.process-id") + 1] == str(number):
            time.sleep(1000)
        distributed._patience = 8
    return true(*args, **kwargs)

setattr(experiments.loop, name, stuck)
"""


@pytest.mark.parametrize(
    ("name", "count", "number", "what"),
    [
        pytest.param("shard_batch", 5, 1, "step 5", marks=pytest.mark.slow),
        pytest.param("load_data", 1, 1, "all to compare their data", marks=pytest.mark.slow),
        pytest.param("make_folder", 1, 0, "process 0, to hear what it has found", marks=pytest.mark.slow),
        pytest.param("_rest", 2, 1, "the checkpoint before that of step 10", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_stuck(tmp_path, name, count, number, what):
    """It is there, so that JAX does not take it for dead."""
    program = _STUCK.format(name=name, count=count, number=number) + PROCESS
    # Only the main process makes a folder.
    options, seconds = (("--distributed.patience", "20"), 20) if name == "make_folder" else ((), 8)
    job = Job(tmp_path, tiny_job(tmp_path), program=program, options=options)
    other = 1 - number
    try:
        assert job.processes[other].wait(200) == distributed.LOST_STATUS
    finally:
        job.processes[number].kill()
    text = job.text(other)
    said = (
        f"error: process {other} of 2 has waited {seconds} s for {what}. Stuck elsewhere: process {number}; look there"
    )
    assert said in text, text


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_while_all_save(tmp_path, capsys, victim):
    """Its part is missing, so the checkpoint is not one; the run goes on from the one before, here in one process."""
    alone, config = (tiny_job(tmp_path, name, checkpoint_every=2) for name in ("alone", "job"))
    train(alone, progress=False)
    job = Job(tmp_path, config)
    job.wait_for_step(config, 5)
    folder = config.directory / "checkpoints"
    while not (saving := list(folder.glob("saving-*"))):
        assert job.processes[victim].poll() is None, job.text()
        time.sleep(0.0005)
    job.processes[victim].kill()
    codes = job.wait(60)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] in (-signal.SIGABRT, distributed.LOST_STATUS), job.text(1 - victim)
    step = int(saving[0].name.removeprefix("saving-"))
    assert (folder / str(step - 2)).is_dir()
    kept = step if (folder / str(step)).is_dir() else step - 2  # the former if all parts were just there
    train(config)
    assert f"continuing after step {kept} of 20" in capsys.readouterr().out
    assert not list(folder.glob("saving-*"))
    assert_same_metrics(metric_rows(config), metric_rows(alone))


@pytest.mark.slow
def test_a_damaged_checkpoint_and_another_model(tmp_path):
    config = tiny_job(tmp_path, steps=10, checkpoint_every=5)
    train(config, progress=False)
    job = Job(tmp_path, with_model(config, d_ff=16))
    assert job.wait() == [1, 1], job.text()
    for number in range(2):
        assert "belongs to another model: model.d_ff is 32 there and 16 here" in job.text(number)

    array = max((config.directory / "checkpoints" / "10" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1])
    alone = metric_rows(config)
    job = Job(tmp_path, config)
    assert job.wait() == [0, 0], job.text()
    assert "checkpoints/10 is damaged: " in job.text()
    assert "Continuing from step 5 instead" in job.text()
    assert "is damaged" not in job.text(1)
    assert_same_metrics(metric_rows(config), alone)
    assert (config.directory / "checkpoints" / "damaged-10").is_dir()


@pytest.mark.slow
def test_a_loss_that_is_not_finite(tmp_path):
    """All processes leave the same steps out, and end together; what was saved before stays."""
    config = tiny_job(tmp_path, steps=3, optim=OptimConfig(learning_rate=1e-2, schedule="constant"))
    train(config, progress=False)
    wild = OptimConfig(learning_rate=1e38, schedule="constant")
    job = Job(tmp_path, dataclasses.replace(config, steps=30, checkpoint_every=1, optim=wild))
    assert job.wait() == [1, 1], job.text()
    assert "WARNING: step 4 is left out: param_norm is inf" in job.text()
    for number in range(2):
        assert "error: step 13: param_norm is inf, as in the 9 steps before" in job.text(number)
    assert restore(config).step == 3
