"""The command that analyses a checkpoint: on every kind of data and memory, its results, and its errors."""

import dataclasses
import sys

import numpy as np
import pytest
import tiny_run

from experiments import analyze, layers, report, results
from experiments.config import TrainConfig
from experiments.data.prosqa import ProsqaData
from fam_jax import Decoder
from lime_jax import DenseFormerConfig, LimeConfig, analysis, prune_router


def mixed(config: TrainConfig, mixing) -> TrainConfig:
    model = dataclasses.replace(config.model, num_layers=3, num_kv_heads=2, mixing=mixing)
    return dataclasses.replace(config, model=model)


def prosqa_config() -> TrainConfig:
    data = ProsqaData(steps=(2, 3), classes=8, samples=40, test_samples=11)
    return TrainConfig(name="tiny-prosqa", model=tiny_run.model_config(None, data.vocab_size), data=data, steps=1)


def text_config(folder, **changes) -> TrainConfig:
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"is it {number} | was it {number}\n" * (number + 3))
    return tiny_run.text_config(source=f"text:{texts}", data_dir=str(folder / "data"), **changes)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["analyze", *map(str, arguments)])
    return analyze.main()


@pytest.fixture
def analysed(tmp_path, monkeypatch, capsys):
    """Runs the command on an untrained model and returns the result, checked as every result is."""

    def run(config, what, *arguments):
        folder = tiny_run.save(config, tmp_path / "runs" / str(hash(config.model)))
        options = ["--checkpoint", folder, "--what", what, "--batch-size", 6]
        assert command(monkeypatch, *options, *arguments) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        file = folder / "results" / f"{config.name}-{what}.json"
        result = results.read(file)
        assert result.kind == what
        assert report.table(result) in printed
        assert str(file) in printed
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert result.config["analyze"]["what"] == what
        assert "output" not in result.config["analyze"]
        return result

    return run


def curves_of(result):
    return {curve["label"].split(", ", 1)[-1]: curve for curve in result.values["curves"]}


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        pytest.param("passkey", marks=pytest.mark.slow),
        "arithmetic",
        pytest.param("prosqa", marks=pytest.mark.slow),
    ],
)
def test_entropy_of_any_checkpoint(kind, analysed, tmp_path):
    config = {
        "text": lambda: text_config(tmp_path, memory=None),
        "passkey": lambda: tiny_run.passkey_config(tiny_run.BSWA),
        "arithmetic": lambda: mixed(tiny_run.arithmetic_config(), LimeConfig()),
        "prosqa": prosqa_config,
    }[kind]()
    result = analysed(config, "entropy", "--sequences", 6, "--length", 20)
    curves = curves_of(result)
    assert set(curves) == {"hidden states", "values"} | ({"mixed values"} if kind == "arithmetic" else set())
    assert curves["hidden states"]["layer"] == list(range(config.model.num_layers + 1))
    assert curves["values"]["layer"] == list(range(1, config.model.num_layers + 1))
    for curve in curves.values():
        assert all(0 < value <= np.log(16) for value in curve["entropy"])
    assert (result.data is not None) == (kind == "text")
    if kind != "arithmetic":
        return
    # The numbers are those of states read by themselves.
    _, variables = tiny_run.init(config.model)
    read = layers.texts(config, 6, length=20)
    states = layers.layer_states(config.model, variables["params"], read.ids, read.lengths)
    want = analysis.layer_entropy(np.asarray(states.values), read.lengths)
    np.testing.assert_allclose(curves["values"]["entropy"], want.mean, rtol=1e-4)


def test_probes_of_any_checkpoint(analysed, tmp_path):
    config = text_config(tmp_path)
    options = ["--sequences", 8, "--length", 100, "--folds", 3]
    result = analysed(config, "probes", *options, "--words", "is it", "was it")
    curves = curves_of(result)
    assert set(curves) == {"hidden states", "values", "chance"}
    assert curves["chance"]["accuracy"] == [0.5] * 3
    assert curves["hidden states"]["accuracy"][0] < 0.9  # the embedding of the same last letter; the layers see more
    assert result.values["words"] == ["is it", "was it"]
    assert np.shape(curves["values"]["folds"]) == (2, 3)
    by_default = analysed(tiny_run.passkey_config(None), "probes", "--sequences", 3, "--examples", 9)
    curves = curves_of(by_default)
    assert curves["hidden states"]["accuracy"][0] == 1.0  # embeddings tell tokens apart
    assert by_default.values["notes"][0].startswith("9 of each: ")
    assert len(by_default.values["words"]) == 4


def test_examples_stand_where_the_words_end(tmp_path):
    read = layers.texts(text_config(tmp_path), 100, length=40)
    found = layers.examples(read, ("is it", "was"), classes=4, most=3, folds=2, seed=0)
    assert np.bincount(found.labels).tolist() == [3, 3]
    texts = [read.tokenizer.decode(ids) for ids in read.ids]
    for row, column, label in zip(found.rows, found.columns, found.labels, strict=True):
        assert texts[row][: column + 1].endswith(found.names[label])
    again = layers.examples(read, ("is it", "was"), classes=4, most=3, folds=2, seed=1)
    assert again.columns.tolist() != found.columns.tolist()
    config = text_config(tmp_path)
    model, variables = tiny_run.init(config.model)
    picked = {
        name: states
        for name, _, states in layers.collect(model, variables["params"], read, 2, found.rows, found.columns)
    }
    whole = {name: states for name, _, states in layers.collect(model, variables["params"], read, 3)}
    for name, states in picked.items():
        np.testing.assert_allclose(states, whole[name][:, found.rows, found.columns], rtol=1e-4, atol=1e-5)


def test_heat_maps_of_static_and_dynamic_routers(analysed, tmp_path):
    static = mixed(tiny_run.arithmetic_config(), LimeConfig())
    result = analysed(static, "routers", "--per-head")
    model, variables = tiny_run.init(static.model)
    mixer = analyze.make_mixer(model.config.mixing, analyze.shape_of(model.config))
    weights = analysis.router_weights(mixer, variables["params"]["mixing"]["layers"])
    heat = analysis.heat_map(mixer, weights)
    curves = curves_of(result)
    assert list(curves)[:4] == ["layer 1", "layer 1, head 1", "layer 1, head 2", "layer 2"]
    for layer in range(3):
        np.testing.assert_allclose(curves[f"layer {layer + 1}"]["share"], heat.layers[layer, : layer + 1])
        np.testing.assert_allclose(curves[f"layer {layer + 1}, head 2"]["share"], heat.heads[layer, 1, : layer + 1])
    np.testing.assert_allclose(result.values["weights"], weights.mean)
    assert result.data is None
    dynamic = mixed(text_config(tmp_path), LimeConfig("dynamic_views"))
    result = analysed(dynamic, "routers", "--sequences", 3, "--length", 20)
    assert result.data is not None
    assert [sum(curve["share"]) for curve in result.values["curves"]] == pytest.approx([1, 1, 1])


def test_depth_circuits(analysed):
    config = mixed(tiny_run.passkey_config(), LimeConfig("static_hidden"))
    result = analysed(config, "depth-circuits", "--circuits", 3)
    curves = curves_of(result)
    shares = [curves[name]["share"] for name in ("read of the own layer", "of the previous layer", "of earlier layers")]
    np.testing.assert_allclose(np.sum(shares, axis=0), 1)
    assert curves["retrieved by later layers"]["layer"] == [1, 2]
    assert len(result.values["edges"]) == len(result.values["notes"]) == 3


def test_semantic_circuits_name_the_words(analysed, tmp_path):
    config = mixed(tiny_run.arithmetic_config(), LimeConfig("dynamic_hidden"))
    result = analysed(config, "semantic-circuits", "--circuits", 5, "--top", 4)
    words = config.data.task().tokenizer.words
    for curve in result.values["curves"]:
        assert curve["token"] == [repr(words[number]) for number in curve["id"]]
        assert curve["rank"] == [1, 2, 3, 4]
        assert curve["weight"] == sorted(curve["weight"], reverse=True)
        assert " <- layer " in curve["label"]
    text = mixed(text_config(tmp_path), LimeConfig("dynamic_kv"))
    result = analysed(text, "semantic-circuits")
    assert layers.word(layers.tokenizer_of(text), 200) == "<200>"  # no text by itself
    assert layers.word(layers.tokenizer_of(text), 10) == r"'\n'"
    assert all(len(row.words) == 10 for row in report.lines(result))


def test_pruning_curve_is_the_loss_of_pruned_models(analysed):
    config = mixed(tiny_run.arithmetic_config(), LimeConfig())
    result = analysed(config, "pruning", "--p", 0.3, 1, "--sequences", 6)
    (curve,) = result.values["curves"]
    model, variables = tiny_run.init(config.model)
    mixer = analyze.make_mixer(model.config.mixing, analyze.shape_of(model.config))
    read = layers.texts(config, 6)
    assert read.weights.sum() < read.lengths.sum()  # of a question, only the answer counts
    for p, loss, cut in zip((0.3, 1), curve["loss"], curve["cut"], strict=True):
        params = dict(variables["params"])
        pruned, cut_report = prune_router(mixer, params["mixing"]["layers"], p)
        logits = Decoder(config.model).apply({"params": {**params, "mixing": {"layers": pruned}}}, read.ids).logits
        log_p = np.asarray(logits) - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(log_p, read.targets[..., None], axis=-1)[..., 0]
        assert loss == pytest.approx((nll * read.weights).sum() / read.weights.sum(), rel=1e-4)
        assert cut == cut_report.share
    assert curve["loss"][0] != curve["loss"][1]
    assert curve["cut"][1] == 0
    assert result.values["notes"][1].startswith("p=1: 0 of 20 weights cut (0.0%)")


def test_texts_are_pieces_of_validation_documents(tmp_path):
    config = text_config(tmp_path)
    read = layers.texts(config, 100, length=16)
    documents = [document.tokens for document in layers.data.documents(config.data, "validation")]
    pieces = [ids[: length + 1] for ids, length in zip(read.ids, read.lengths, strict=True)]
    first = [tokens[: len(piece)] for tokens, piece in zip(documents, pieces, strict=False)]
    for piece, tokens in zip(pieces, first, strict=False):
        np.testing.assert_array_equal(piece[: len(tokens)], tokens[: len(piece)])
    assert read.lengths.sum() == sum(len(tokens) - 1 for tokens in documents)
    np.testing.assert_array_equal(read.targets[:, :-1], read.ids[:, 1:])
    assert read.weights.sum() == read.lengths.sum()


def test_report_draws_heat_maps_with_words_from_files(tmp_path):
    curves = [
        {"label": "a | b", "seed": 0, "rank": [1, 2], "weight": [0.5, 0.25], "token": ["'|'", "'$x'"]},
        {"label": "c", "seed": 0, "rank": [1], "weight": [None], "token": ["'y'"]},
    ]
    made = {"config": {}, "seeds": [0], "wall_seconds": 0.0}
    result = results.make("semantic-circuits", "demo", values={"curves": curves}, **made)
    table = report.table(result)
    assert r"a \| b" in table
    assert r"'\|' 0.500" in table
    assert "'y' not finite" in table
    assert report.plot(result, tmp_path / "x.png").stat().st_size > 1000
    del curves[0]["token"]
    with pytest.raises(results.ResultError, match=r"'values.curves\[0\].token' is missing"):
        report.table(dataclasses.replace(result, values={"curves": curves}))


def test_command_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    plain = tiny_run.save(tiny_run.arithmetic_config(), tmp_path / "plain")
    rival = tiny_run.save(mixed(tiny_run.arithmetic_config(), DenseFormerConfig()), tmp_path / "rival")
    static = tiny_run.save(mixed(tiny_run.arithmetic_config(), LimeConfig()), tmp_path / "static")
    dynamic = tiny_run.save(mixed(tiny_run.arithmetic_config(), LimeConfig("dynamic_hidden")), tmp_path / "dynamic")
    average = tiny_run.save(mixed(tiny_run.arithmetic_config(), LimeConfig("average")), tmp_path / "average")
    for run, what, arguments, message in (
        (plain, "routers", [], "what='routers' needs a router, but the run 'tiny-arithmetic' has none"),
        (rival, "pruning", [], "(model.mixing is DenseFormerConfig())"),
        (static, "semantic-circuits", [], "router='static_kv' weighs all alike"),
        (dynamic, "pruning", ["--sequences", 2], "router='dynamic_hidden' has no weights of its own to prune"),
        (average, "pruning", ["--sequences", 2], "router='average' has no weights of its own to prune"),
        (static, "pruning", ["--p", 0, "--sequences", 2], "p=0.0 is not allowed"),
        (plain, "entropy", ["--order", 0, "--sequences", 2], "order=0.0 is not allowed"),
        (plain, "entropy", ["--sequences", 0], "sequences=0 is not allowed"),
        (plain, "entropy", ["--source", "pg19"], "source='pg19' is for models of text"),
        (plain, "probes", ["--words", "="], "at least two different words apart, not ="),
        (plain, "probes", ["--words", "=", "0 0 0"], "too seldom for 5 folds; read more"),
        (plain, "probes", ["--words", "=", "x"], "has no 'x'"),
        (plain, "entropy", ["--name", "a/b"], "cannot name a result file"),
        (tmp_path / "none", "entropy", [], "no checkpoint in"),
    ):
        assert command(monkeypatch, "--checkpoint", run, "--what", what, "--output", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert error.startswith("error: ")
    assert not list((tmp_path / "out").iterdir())
