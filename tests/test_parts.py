"""Where the time of a step goes: names of instructions, sums by hand, and the command."""

import sys

import pytest

from experiments import benchmark, parts, results

PROGRAM = """HloModule jit_train

%body (arg: (f32[2])) -> (f32[2]) {
  %arg = (f32[2]) parameter(0)
  %copy.1 = f32[2]{0} copy(%x)
  ROOT %dot.2 = f32[2]{0} dot(%copy.1, %y), metadata={op_name="jit(train)/jvp(Decoder)/fam_scan/while/body/dot"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %while.3 = (f32[2]{0}, s32[]) while(%t), body=%body, metadata={op_name="jit(train)/jvp(Decoder)/fam_scan/while"}
  %add.4 = f32[2]{0} add(%b, %c), metadata={op_name="jit(train)/add"}
  ROOT %copy.5 = f32[2]{0} copy(%add.4)
}
"""


def test_names_are_those_of_instructions_or_of_the_loop_around():
    loop = "jit(train)/jvp(Decoder)/fam_scan/while"
    assert parts.names(PROGRAM) == {
        "copy.1": loop,
        "dot.2": f"{loop}/body/dot",
        "add.4": "jit(train)/add",
        "copy.5": "",
    }


@pytest.mark.parametrize(
    ("scopes", "part"),
    [
        ("", "without a name"),
        ("jit(train)/mul", "optimizer"),
        ("jit(train)/jvp(Decoder)/gather", "embedding and loss"),
        ("jit(train)/transpose(jvp(Decoder))/layers/while/body/add", "rest of layers, backward"),
        ("jit(train)/transpose(jvp(Decoder))/layers/while/body/fam_scan/while/body/project/dot", "FAM, backward"),
        ("jit(train)/jvp(Decoder)/layers/while/body/project/mix/dot", "mixing of layers"),
        ("jit(train)/jvp(Decoder)/layers/while/body/project/transpose", "projections of attention"),
    ],
)
def test_parts_by_scopes(scopes, part):
    assert parts.part_of(scopes) == part


def test_times_add_up_and_what_runs_at_once_is_busy_once():
    events = [
        parts.Event("dot.2", 0, 4e6),
        parts.Event("dot.2", 3e6, 2e6),
        parts.Event("add.4", 6e6, 1e6),
        parts.Event("copy.1", 6.5e6, 0.1e6),
        parts.Event("another program's", 0, 9e9),
    ]
    found, busy = parts.add_up(events, parts.names(PROGRAM))
    assert found == {"FAM": (pytest.approx(6.1), 3), "optimizer": (pytest.approx(1), 1)}
    assert busy == pytest.approx(6)


def test_command(tmp_path, monkeypatch, capsys):
    shape = "--layers 2 --width 16 --heads 2 --kv-heads 2 --head-dim 8 --vocab 64 --block 8 --fam 2"
    words = f"parts {shape} --dtype float32 --arms bswa fam+lime --length 32 --rounds 1 --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["benchmark", *words.split()])
    assert benchmark.main() == 0
    result = results.read(tmp_path / "parts.json")
    bswa, fam = (set(curve["name"]) for curve in result.values["curves"])
    both = {"attention", "projections of attention, backward", "feed-forward", "optimizer"}
    assert both <= bswa & fam
    assert {"FAM", "FAM, backward", "mixing of layers"} <= fam - bswa
    for curve in result.values["curves"]:
        assert sum(curve["milliseconds"]) > 0
        assert 0 <= curve["idle_milliseconds"] < curve["traced_milliseconds"]
    assert parts.table(result) in capsys.readouterr().out
    assert (tmp_path / "parts.png").exists()
    monkeypatch.setattr(sys, "argv", ["benchmark", "parts", "--arms", "x-transformers"])
    assert benchmark.main() == 2
    assert "['x-transformers'] are of another library" in capsys.readouterr().err
