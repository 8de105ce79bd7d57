"""What goes wrong around a checkpoint that is being written neither hides nor ends what is well."""

import shutil

from test_checkpoint import trees
from train_helpers import tiny

from experiments.checkpoint import Checkpoints
from experiments.writing import Write


def test_a_part_that_cannot_be_begun_does_not_keep_others_from_it(tmp_path):
    begun, finished = [], []

    def bad():
        raise RuntimeError("first")

    def good():
        begun.append(True)
        return type("Part", (), {"result": lambda self: None})()

    write = Write(1, tmp_path, [bad, good], lambda: finished.append(True), lambda: None)
    write.join()
    assert str(write.error) == "first"
    assert begun  # other processes may wait for this one there
    assert not finished


def test_an_old_checkpoint_that_cannot_be_deleted(tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path)
    folder = Checkpoints(config.directory / "checkpoints", keep=1)
    folder.save(1, *trees(1), config, {})

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        folder.save(2, *trees(2), config, {})
    assert "WARNING: the old checkpoint" in capsys.readouterr().err
    assert folder.steps() == [2]
    assert (folder.directory / "deleting-1").is_dir()
    folder.save(3, *trees(3), config, {})
    assert [path.name for path in folder.directory.iterdir()] == ["3"]
