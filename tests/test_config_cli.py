"""Configs: JSON, the named ones, and a command line that refuses what is wrong before it compiles."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from train_helpers import ROOT, tiny, trace_step, with_model

import experiments.train
from experiments import configs
from experiments.config import TrainConfig, check
from experiments.data.arithmetic import ArithmeticData
from experiments.data.babi import BabiData
from experiments.data.pairs import PairsData
from experiments.data.passkey import PasskeyData
from experiments.data.prosqa import ProsqaData
from experiments.data.tracking import TrackingData
from experiments.optim import OptimConfig
from experiments.train import main, parse_config
from experiments.typed import differences, from_json, to_json
from fam_jax import MemoryConfig


@pytest.mark.parametrize("name", configs.summaries())
def test_named_configs(name, tmp_path, monkeypatch):
    config = configs.get(name)
    if getattr(config.data, "tokenizer", "bytes") not in ("bytes", "words"):  # beside a model that must be there first
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"tokenizer='runs/.*there is no such file"):
            check(config)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bytes"))
    check(config)
    assert config.name == name
    assert configs.summaries()[name].endswith(".")
    assert from_json(json.loads(json.dumps(to_json(config))), TrainConfig) == config
    hash(config)
    trace_step(config)


def test_json_round_trip(tmp_path):
    passkey = dataclasses.replace(tiny(tmp_path), data=PasskeyData(blocks=(5, 9)))
    full = dataclasses.replace(passkey, model=dataclasses.replace(passkey.model, memory=None))
    others = (ArithmeticData(operands=(4, 5)), ProsqaData(steps=(3,)), PairsData(live=2), TrackingData(), BabiData())
    tasks = [dataclasses.replace(full, data=data) for data in others]
    for config in (tiny(tmp_path), passkey, full, *tasks):
        text = json.dumps(to_json(config))
        assert from_json(json.loads(text), TrainConfig) == config
    assert to_json(passkey)["data"]["type"] == "PasskeyData"
    assert from_json(to_json(OptimConfig(b1=0.5)), OptimConfig) == OptimConfig(b1=0.5)


def edit(values, path, value):
    *parents, last = path.split(".")
    for key in parents:
        values = values[key]
    if value is ...:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.memory.fam_len", 3, "config.model.memory.fam_len is not known; MemoryConfig has block_size"),
        ("stepz", 3, "config.stepz is not known"),
        ("steps", ..., "config.steps is missing"),
        ("steps", "many", "config.steps='many' is not allowed; it must be int"),
        ("steps", True, "config.steps=True is not allowed"),
        ("steps", -1, "TrainConfig.steps=-1 is not allowed"),
        ("optim", 3, "config.optim=3 is not allowed; OptimConfig needs an object"),
        ("optim.schedule", "steep", "config.optim.schedule='steep' is not allowed"),
        (
            "data.type",
            "Cats",
            "config.data.type='Cats' is not known; it must be one of TextData, PasskeyData, PairsData",
        ),
        ("model.num_kv_heads", 3, "num_kv_heads=3 does not divide num_heads=2"),
        ("work_dir", 3, "config.work_dir=3 is not allowed; it must be str or NoneType"),
    ],
)
def test_json_errors_name_the_key(tmp_path, path, value, message):
    values = to_json(tiny(tmp_path))
    edit(values, path, value)
    with pytest.raises(ValueError, match=message):
        from_json(values, TrainConfig)


def test_json_defaults_and_types(tmp_path):
    values = to_json(tiny(tmp_path))
    edit(values, "eval_steps", ...)
    edit(values, "z_loss", 0)
    config = from_json(values, TrainConfig)
    assert config.eval_steps == 16  # older files lack what came later
    assert type(config.z_loss) is float


def test_differences():
    before, now = {"a": 1, "b": {"c": 2, "d": [1]}, "e": None}, {"a": 1, "b": {"c": 3, "d": [1]}, "f": 4}
    assert list(differences(before, now)) == [("b.c", 2, 3), ("f", None, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": 255}}, r"model.vocab_size=255 is too small .* at least 256"),
        ({"model": {"memory": None}}, r"full attention .* use data.mode='packed'"),
        ({"data": {"block_size": 16}}, r"data.block_size=16 and model.memory.block_size=8 differ"),
        ({"data": {"mode": "packed", "length": 7}}, r"rows of 7 tokens hold no complete block of 8"),
        ({"optim": {"warmup_steps": 20}}, r"warmup_steps=20 leaves nothing"),
        ({"data": {"tokenizer": "none.model"}}, r"none.model"),
    ],
)
def test_parts_must_fit(tmp_path, changes, message):
    config = tiny(tmp_path)
    for part, fields in changes.items():
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})
    with pytest.raises(ValueError, match=message):
        check(config)


@pytest.mark.parametrize("data", [ArithmeticData(), ProsqaData(steps=(2,), classes=4)])
def test_questions_have_a_validation_split_and_need_their_vocabulary(tmp_path, data):
    config = dataclasses.replace(tiny(tmp_path, eval_every=5), data=data)
    check(config)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=60))
    with pytest.raises(
        ValueError, match=rf"vocab_size=60 is too small for the \w+ task, .* at least {data.vocab_size}"
    ):
        check(small)
    blocks = dataclasses.replace(config.model, memory=MemoryConfig(128, fam_length=2, rsp=0.5))
    with pytest.raises(ValueError, match=rf"rows of {data.length} tokens hold no complete block of 128 tokens"):
        check(dataclasses.replace(config, model=blocks))


def test_overrides_of_questions():
    words = "--data.operands 4 5 6 --data.reading modular --data.seed 3"
    config = parse_config("arithmetic", words.split())
    assert config.data == dataclasses.replace(
        configs.get("arithmetic").data, operands=(4, 5, 6), reading="modular", seed=3
    )


def test_passkey_counts_in_the_blocks_of_the_model(tmp_path):
    config = dataclasses.replace(tiny(tmp_path), data=PasskeyData(block_size=16))
    with pytest.raises(ValueError, match=r"data.block_size=16 and model.memory.block_size=8 differ, but the PassKey"):
        check(config)
    check(with_model(config, memory=MemoryConfig(block_size=16)))
    check(with_model(config, memory=None))  # full attention has no blocks


def test_passkey_has_no_validation_split(tmp_path):
    config = with_model(tiny(tmp_path), memory=None)
    config = dataclasses.replace(config, data=PasskeyData())
    check(config)
    with pytest.raises(ValueError, match="eval_every=5 is not allowed: the PassKey task has no validation split"):
        check(dataclasses.replace(config, eval_every=5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("keep", 0),
        ("keep_every", 15),
        ("keep_best", -1),
        ("keep_best", 1),
        ("z_loss", -1.0),
        ("name", "a/b"),
        ("name", ""),
    ],
)
def test_bad_values(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"TrainConfig.{field}={value!r} is not allowed"):
        dataclasses.replace(tiny(tmp_path), **{field: value})


def test_overrides():
    words = "--optim.learning-rate 1e-4 --model.memory.fam-length 4 --steps 7 --model.remat full"
    config = parse_config("lm", [*words.split(), "--data.source", "text:a b/*.txt"])
    assert (config.optim.learning_rate, config.model.memory.fam_length, config.steps) == (1e-4, 4, 7)
    assert config.model.remat == "full"
    assert config.data.source == "text:a b/*.txt"
    plain = configs.get("lm")
    changed = {field for field, _, _ in differences(to_json(plain), to_json(config))}
    assert changed == {
        "optim.learning_rate",
        "model.memory.fam_length",
        "steps",
        "model.remat",
        "data.source",
    }


WRONG = [
    (["--optim.learning-rat", "1"], "--optim.learning-rat"),
    (["--steps", "many"], "steps"),
    (["--steps", "-1"], "TrainConfig.steps=-1 is not allowed"),
    (["--optim.schedule", "steep"], "steep"),
    (["--model.num-heads", "3", "--model.num-kv-heads", "2"], "does not divide"),
    (["--model.memory.block-size", "0"], "block_size=0"),
    (["--model.memory.fam-length", "129"], "longer than block_size=128"),
    (["--model.vocab-size", "100"], "vocab_size=100 is too small"),
    (["--data.length", "100"], "multiple of block_size"),
    (["--data.source", "novels"], "python-source"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_settings(monkeypatch, capsys, words, message):
    monkeypatch.setattr(experiments.train, "train", lambda *args, **kwargs: pytest.fail("training began"))
    try:
        status = main(["--config", "lm", *words])
    except SystemExit as exit:
        status = exit.code
    shown = capsys.readouterr()
    assert status == 2
    unboxed = " ".join(shown.err.replace("│", " ").split())
    assert message in unboxed
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nope"], "config 'nope' is not known; there are "),
        ([], "--config NAME"),
        (["--conf", "lm"], "--config NAME"),
    ],
)
def test_no_such_config(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_bad_data(tmp_path, monkeypatch, capsys):
    """What is wrong with the text is found before anything is compiled."""
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: lambda *a, **k: pytest.fail("compiled"))
    place = ["--data.data-dir", str(tmp_path / "data"), "--work-dir", str(tmp_path / "run")]
    assert main(["--config", "lm", "--data.source", f"text:{tmp_path / 'none'}", *place]) == 2
    assert "no file matches" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert main(["--config", "lm", "--data.source", f"text:{tmp_path / 'empty.txt'}", *place]) == 2
    assert "empty.txt" in capsys.readouterr().err
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)))
    assert main(["--config", "lm", "--data.source", f"text:{tmp_path / 'picture.txt'}", *place]) == 2
    assert "picture.txt" in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in configs.summaries())
    with pytest.raises(SystemExit) as exit:
        main(["--config", "lm", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--model.memory.fam-length", "--optim.learning-rate", "--data.source", "--fresh"):
        assert option in shown


def test_command_line_in_a_process(tmp_path):
    command = [sys.executable, "-m", "experiments.train", "--config", "lm", "--stepps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 2
    assert "--stepps" in done.stderr
    assert "Traceback" not in done.stderr


def test_import_has_no_effect():
    code = "import sys, experiments.train, jax; assert not jax._src.xla_bridge._backends; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "ok\n", done.stderr
