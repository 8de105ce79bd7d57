"""What a FAM does: summaries of hand-made maps, rows exchanged by hand, and the command."""

import dataclasses
import sys

import numpy as np
import pytest
import tiny_run
from matplotlib.figure import Figure

from experiments import analyze, layers, memory_maps, report, results
from experiments.data.passkey import Passkey
from fam_jax.attention_maps import attention_maps


def reading_of(rng, l=2, b=3, n=4, c=5, f=2, d=6):
    shapes = (l, b, n, c, f), (l, b, n, c), (l, b, n, f, c), (l, b, n + 1, f, d)
    return memory_maps.Reading(*(rng.random(shape) for shape in shapes))


def test_drift_of_known_rows():
    """A row that doubles, then turns by a right angle; the start, which is no memory, does not count."""
    fam = np.array([[9.0, 9.0], [3.0, 4.0], [6.0, 8.0], [-8.0, 6.0]])[None, None, :, None]
    found = memory_maps.drift(np.concatenate([fam, fam], axis=1))
    np.testing.assert_allclose(found.norm, [[5 / 2**0.5, 10 / 2**0.5, 10 / 2**0.5]])
    np.testing.assert_allclose(found.change, [[1, 2**0.5]])
    np.testing.assert_allclose(found.cosine, [[1, 0]], atol=1e-12)


def test_reads_of_and_at_places_are_plain_sums():
    rng = np.random.default_rng(0)
    reading = reading_of(rng)
    places = np.zeros((3, 20), bool)
    places[0, [4, 5]] = places[2, [0, 1, 19]] = True  # two blocks of the first text, two of the last
    blocks = {(0, 0): [4], (0, 1): [0], (2, 0): [0, 1], (2, 3): [4]}
    want = np.mean([reading.fam_block[:, b, n][..., c].sum(-1) for (b, n), c in blocks.items()], axis=0)
    np.testing.assert_allclose(memory_maps.reads_of_places(reading, places), want)
    at = np.mean([reading.token_fam[:, b, n, c] for (b, n), every in blocks.items() for c in every], axis=0)
    np.testing.assert_allclose(memory_maps.reads_at_places(reading, places), at)


def test_attention_by_layer_leaves_the_first_block_out_and_tells_how_few_tokens_rows_pick():
    reading = reading_of(np.random.default_rng(1), n=3, c=20)
    reading.fam_block[0] = 0.03  # all tokens alike
    reading.fam_block[1] = 0
    reading.fam_block[1, ..., [4, 11]] = 0.2  # two of twenty
    for part in reading[:3]:
        part[:, :, 0] = 9
    curves = {name: curve["share"] for name, curve in memory_maps.layer_curves(reading).items()}
    np.testing.assert_allclose(curves["FAM rows, of the block"], [0.6, 0.4])
    np.testing.assert_allclose(curves["the tenth of its tokens that a row reads most"], [0.1, 1])
    np.testing.assert_allclose(curves["tokens, of the FAM"], reading.token_fam[:, :, 1:].sum(-1).mean((1, 2, 3)))
    np.testing.assert_allclose(curves["tokens, of past blocks"], reading.token_past[:, :, 1:].mean((1, 2, 3)))
    with pytest.raises(ValueError, match="texts of two blocks or more"):
        memory_maps.layer_curves(reading_of(np.random.default_rng(1), n=1))


@pytest.mark.parametrize("depth", ["first", "uniform"])
def test_the_key_is_told_twice_before_the_question(depth):
    data = dataclasses.replace(tiny_run.passkey_config().data, digits=3, depth=depth, filler="decoys")
    task = Passkey(data)
    batch = task.sample(np.random.default_rng(0), 5, 12)
    told = memory_maps.told_places(batch["tokens"], batch["targets"], batch["weights"])
    for row in range(5):
        assert told[row].sum() == 6
        key = task.tokenizer.decode(batch["targets"][row, -3:])
        text = task.tokenizer.decode(batch["tokens"][row, told[row]])
        assert text == f"{key} {key}"
        assert task.tokenizer.decode(batch["tokens"][row, : np.flatnonzero(told[row])[0]]).endswith("The pass key is")


@pytest.mark.slow
def test_exchanged_rows_are_those_of_the_next_text():
    config = tiny_run.passkey_config(dataclasses.replace(tiny_run.FAM, segments=1))
    model, variables = tiny_run.init(config.model)
    batch = dataclasses.replace(config.data, digits=2).task().sample(np.random.default_rng(1), 6, 9)
    ids, targets, weights = batch["tokens"], batch["targets"], batch["weights"]
    digits = variables["params"]["embed"].at[:10].multiply(20.0)  # answers with digits
    variables = {"params": variables["params"] | {"embed": digits}}
    found = memory_maps.exchange_rows(model, variables, ids, targets, weights)
    start = (ids.shape[1] - 2) // 8 * 8
    state = model.apply(variables, ids[:, :start]).state
    others = np.roll(np.arange(6), -1)

    def shares(fam):
        told = model.apply(variables, ids[:, start:], dataclasses.replace(state, fam=fam)).logits[:, -2:].argmax(-1)
        return (told == targets[:, -2:]).mean(0), (told == targets[others, -2:]).mean(0)

    for l in range(2):
        for f in range(2):
            fam = state.fam.at[l, :, f].set(state.fam[l, others, f])
            np.testing.assert_allclose((found.own[l, f], found.other[l, f]), shares(fam))
    np.testing.assert_allclose((found.all_own, found.all_other), shares(state.fam[:, others]))
    with pytest.raises(ValueError, match="ids has 1 texts; give two or more"):
        memory_maps.exchange_rows(model, variables, ids[:1], targets[:1], weights[:1])
    window, its = tiny_run.init(tiny_run.passkey_config(tiny_run.BSWA).model)
    with pytest.raises(ValueError, match="there are no FAM rows to exchange"):
        memory_maps.exchange_rows(window, its, ids, targets, weights)


def test_maps_are_drawn_as_they_are():
    memory = dataclasses.replace(tiny_run.FAM, segments=2, fam_blocks=2)
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    ids = np.random.default_rng(0).integers(0, 256, (2, 32)).astype(np.int32)
    maps = attention_maps(model.config, variables["params"], ids)
    table = memory_maps.matrix(maps, 1, 0, 2)
    assert table.shape == (8 + 2, 2 * 2 + 2 * 8 + 8)
    np.testing.assert_allclose(np.nansum(table, axis=1), 1, rtol=1e-5)
    assert np.isnan(table[8:, [0, 1, *range(4, 20)]]).all()
    np.testing.assert_allclose(table[3, 4:12], maps.token_past[1, 0, 2, :, 3, 0].mean(0))
    figure = Figure()
    axes = figure.subplots(1, 2)
    memory_maps.plot_maps(maps, axes, block=2)
    np.testing.assert_allclose(axes[1].images[0].get_array().filled(np.nan), table)
    assert [axis.get_title() for axis in axes] == ["layer 1", "layer 2"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["analyze", *map(str, arguments)])
    return analyze.main()


def result_of(folder, config, what, monkeypatch, *arguments):
    run = tiny_run.save(config, folder / what)
    assert command(monkeypatch, "--checkpoint", run, "--what", what, "--batch-size", 2, *arguments) == 0
    result = results.read(run / "results" / f"{config.name}-{what}.json")
    assert result.kind == what
    assert (run / "results" / f"{config.name}-{what}.png").read_bytes().startswith(b"\x89PNG")
    return result, {curve["label"].split(", ", 1)[-1]: curve for curve in result.values["curves"]}


def test_command_on_a_pass_key_model(tmp_path, monkeypatch, capsys):
    config = tiny_run.passkey_config()
    model, variables = tiny_run.init(config.model)
    read = layers.texts(config, 5, level=11)
    reading = memory_maps.read(model, variables["params"], read.ids, 5)
    options = ("--sequences", 5, "--level", 11)
    _, curves = result_of(tmp_path, config, "attention", monkeypatch, *options)
    parts = ["tokens, of the FAM", "tokens, of past blocks", "FAM row 1, of the block", "FAM row 2, of the block"]
    assert list(curves) == [f"layer {layer}, {part}" for layer in (1, 2) for part in parts]
    want = reading.token_fam[1].sum(-1).mean((0, 2))
    np.testing.assert_allclose(curves["layer 2, tokens, of the FAM"]["share"], want, rtol=1e-4)
    want = reading.fam_block[1, :, :, 0].sum(-1).mean(0)
    np.testing.assert_allclose(curves["layer 2, FAM row 1, of the block"]["share"], want, rtol=1e-4)
    _, curves = result_of(tmp_path, config, "attention-layers", monkeypatch, *options)
    want = reading.token_fam[:, :, 1:].sum(-1).mean((1, 2, 3))
    np.testing.assert_allclose(curves["tokens, of the FAM"]["share"], want, rtol=1e-4)
    result, curves = result_of(tmp_path, config, "fam-drift", monkeypatch, *options)
    assert curves["layer 1"]["block"] == list(range(2, 12))
    np.testing.assert_allclose(curves["layer 2"]["change"], memory_maps.drift(reading.fam).change[1], rtol=1e-4)
    assert report.table(result).count("\n\n") == 2
    capsys.readouterr()
    _, curves = result_of(tmp_path, config, "fam-rows", monkeypatch, *options)
    assert len(curves) == 2 * 4
    assert "with all rows of another text" in capsys.readouterr().out


def test_command_on_text(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"is it {number} | was it {number}\n" * (number + 3))
    memory = dataclasses.replace(tiny_run.FAM, segments=1)
    config = tiny_run.text_config(memory, source=f"text:{tmp_path / 'texts'}", data_dir=str(tmp_path / "data"))
    options = ("--length", 20, "--sequences", 6)  # not all pieces are that long
    result, curves = result_of(tmp_path, config, "attention", monkeypatch, *options)
    assert curves["layer 1, tokens, of past blocks"]["block"] == [1, 2]
    assert curves["layer 1, tokens, of past blocks"]["share"][0] == 0
    assert 0 < result.values["texts"] < 6


def test_command_refuses_what_has_no_fam_or_no_key(tmp_path, monkeypatch, capsys):
    window = tiny_run.save(tiny_run.passkey_config(tiny_run.BSWA), tmp_path / "window")
    pairs = tiny_run.save(tiny_run.pairs_config(), tmp_path / "pairs")
    passkey = tiny_run.save(tiny_run.passkey_config(), tmp_path / "passkey")
    text = tiny_run.save(tiny_run.text_config(), tmp_path / "text")
    for run, arguments, message in (
        (window, ["attention"], "what='attention' needs a FAM, but the run 'tiny-passkey' has none"),
        (pairs, ["fam-rows"], "what='fam-rows' looks for a pass key"),
        (passkey, ["fam-rows", "--level", 2], "blocks=(2,): must be at least"),
        (passkey, ["fam-rows", "--sequences", 1], "give two or more"),
        (passkey, ["fam-drift", "--level", 0], "level=0 is not allowed"),
        (text, ["fam-drift", "--level", 9], "level=9 is for tasks with levels"),
    ):
        assert command(monkeypatch, "--checkpoint", run, "--output", tmp_path / "out", "--what", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
