"""Writes experiments/README.md from the result files: `python -m experiments.evidence`.

Every comparison of experiments/ablations with its claim, its command and what is measured so far, at every size.
Figures go to experiments/docs/rows.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import tyro

from experiments import ablate, ablations, report, results, search
from experiments.command import modules, run_command

PAGE = Path(__file__).with_name("README.md")
FIGURES = "docs/rows"

INSIDE = """## Inside trained models

What the papers show of trained models, any run shows: `--checkpoint runs/ROW-SIZE-ARM-SEED` is that of an arm.
Two notebooks, [fam.ipynb](notebooks/fam.ipynb) and [lime.ipynb](notebooks/lime.ipynb), go through it.

    python -m experiments.analyze --checkpoint runs/lime_methods-cpu-LIMe-static_kv-0 --what entropy

| of | `--what` | the paper's claim |
| --- | --- | --- |
| a FAM | attention, attention-layers | tokens read the FAM, FAM rows some tokens (TransformerFAM, figure 11) |
| a FAM | fam-rows | none: which rows hold a pass key, by attention, and by what is told with another text's row |
| a FAM | fam-drift | none: the size of the rows, and their change from block to block |
| any model | entropy | of values, higher with LIMe in nearly all layers; of hidden states, no clear difference (LIMe) |
| any model | probes | on values of late layers, near 1 with LIMe and less without; on hidden states not (LIMe) |
| LIMe | routers | layers 2 to 4 and the last ones read layer 1; all read the layer before them (LIMe) |
| LIMe | depth-circuits | the deeper, the less a layer reads itself (LIMe, first version) |
| LIMe | semantic-circuits | a token's own router follows its form: suffixes, conjunctions (LIMe, first version) |
| LIMe | pruning | a fifth of the weights can go at p = 0.9 (LIMe, first version) |
"""

ACCOUNT = """## What did not come out as in the papers

- **Loss in books, and of mixtures of layers** ([books](#books), [together](#together), [lime_methods](#lime_methods),
  [lime_sources](#lime_sources)). The papers' differences are a few hundredths of a nat, after billions of tokens. At
  `cpu` size a run reads about a million bytes, once: everything that is learnt is short-range, seeds differ by as much,
  and whatever adds something to learn begins behind. What needs no learning, the fixed average of layers, is ahead. We
  take these rows for a check that nothing is broken; the `gpu` and `paper` sizes are to decide.
- **Time** ([lime_time](#lime_time)). The paper's LIMe takes 1 to 2 % longer. In models this small mixing takes much of
  a step on a CPU, so that at equal time no mixing is ahead; [speed](docs/speed.md) has larger ones. Deeper models gain
  more ([lime_depth](#lime_depth)), as the paper says, here from 32 layers on.
- **The rate of LIMe's routers** ([lime_router](#lime_router)). The paper found 1e-2 better than 1e-3, the rate of the
  rest. Small models on few tokens want 4e-3 for the rest, and ten times that is too much for routers: with the rate of
  the rest, or a tenth, LIMe is level with no mixing (1.718 and 1.720 against 1.716, three seeds), with ten times it is
  behind (1.745). Ten times is what all other rows with LIMe have, among them
  [together_retrieval](#together_retrieval) and [together_arithmetic](#together_arithmetic),
  where LIMe slows a FAM down: nobody has searched their rates.
- **Arithmetic** ([arithmetic](#arithmetic)). LIMe learns sooner, but both arms still rise when the 26 epochs of
  `cpu-long` end; the paper has 200. The 41.3 % that it has then without LIMe are passed here after 13, which speaks for
  another learning rate.
- **Random State Passing** ([passkey_rsp](#passkey_rsp)) helps in the paper. It starts a text with another text's
  memory, so a model learns to distrust what is old, which a pass key is. FAM noise, of ours, does what RSP is for
  without that ([passkey_noise](#passkey_noise)).
- **RMT** ([passkey_rivals](#passkey_rivals)) is last in the paper and second here. Ours is trained with its gradient
  through all blocks, from scratch, with a curriculum; two seeds of three learn the task.
- **The query of a memory** ([babi](#babi), [rewrite](#rewrite)). In the paper rows that ask the same at each block
  (static summary tokens) fail where FAM does not, and in [passkey_rivals](#passkey_rivals) so they do here. But they
  hold facts at four times the trained length, and some rewritten pairs at twice, where FAM and RMT lose all; one seed.
- **Pretrained models** ([retrofit](#retrofit), [retrofit_passkey](#retrofit_passkey)). 400 steps of LoRA on 135M
  parameters teach the rows of a FAM to help, but not to carry, and what is carried drifts beyond the trained length.
  The paper trains 1B to 24B parameters for 50,000 steps, on rows of 8 blocks.
"""

INTRO = """# Evidence

Every claim of the two papers that this code can test, the command that tests it, and what came out. The papers are
[TransformerFAM](https://arxiv.org/abs/2404.09173) and [LIMe](https://arxiv.org/abs/2502.09245). This page is made by
`python -m experiments.evidence` from the files in `experiments/results`, which tell settings, versions, machine and
commit of each run.

A comparison has several arms, which differ in what is compared alone, or in what the row says: all have the same steps.
Where a row shows a table of scores by learning rate, `python -m experiments.search ROW` had tried half and twice the
rate for each arm, with a seed of its own, before the seeds of the comparison were run, and each arm has its best; other
rows have one rate for all arms, or say what they have. The data are the same, too, but for tasks with a curriculum,
where an arm that fails stays at short texts. `cpu` is at most five minutes a run on two cores, most take one or two;
with two runs side by side, all seeds of the core rows took three hours, without the searches, and those of all rows
would take eleven. `gpu` is at most ten minutes a run on one GPU, `paper` the published shapes.
`python -m experiments.ablate ROW --size cpu` trains and measures all arms and seeds, and goes on where it was stopped.
Core rows carry the papers' main claims. A \u00b1 is half the width of
the 95 % interval of the mean over seeds; without one, a single seed was run.
"""


def page(output: Path = results.DIRECTORY) -> str:
    """The Markdown of the page.

    Args:
        output: Folder of the result files.

    Raises:
        ResultError: A result file is damaged.
        ValueError: One was measured with other settings than its arm has.
    """
    cells = [["row", "core", "what it compares", "runs", "outcome"]]
    sections = []
    for name, summary in modules(ablations).items():
        row = ablate.load(name)
        found = measured(name, output)
        whole = {size: len(row.arms(size)) * len(ablate.SEEDS) for size in found}
        runs = ", ".join(f"{size} {len(result.config)} of {whole[size]}" for size, result in found.items())
        verdict = getattr(row, "VERDICT", "")
        outcome = verdict or ("see below" if found else "open")
        cells.append([f"[{name}](#{name})", "yes" if row.CORE else "", summary, runs or "none yet", outcome])
        sections += [f"## {name}", _text(inspect.getdoc(row) or "")]
        if verdict:
            sections.append(f"**Outcome**: {verdict}")
        for size, result in found.items():
            folder = output / ablate.SEARCH / f"{name}-{size}"
            searched = [search.table(name, size, folder)] if folder.exists() else []
            sections += [
                f"Size `{size}`:",
                *searched,
                report.table(result),
                f"![{result.name}]({FIGURES}/{result.name}.png)",
            ]
        for prefix, told in getattr(row, "BESIDE", {}).items():
            beside = together(prefix, told, output)
            sections += [report.table(beside)] if beside else []
    first = [INTRO.strip(), report.markdown(cells, right=False), ACCOUNT.strip(), INSIDE.strip()]
    return "\n\n".join(first + sections) + "\n"


def measured(name: str, output: Path) -> dict[str, results.Result]:
    """What is measured of a row, by size."""
    found = {}
    for size in ablate.load(name).SIZES:
        options = ablate.Options(size=size)
        result = ablate.combined(name, size, ablate.configs(name, options, checked=False), output)
        if result is not None:
            found[size] = result
    return found


def together(prefix: str, label: str, output: Path) -> results.Result | None:
    """Results of several runs, which `experiments.evaluate` has measured, as one; None if there are none.

    Args:
        prefix: Of the names of their files, before the seed or the arm.
        label: What a run is called in the table; `{}` is what its result calls it.
        output: Folder of the result files.
    """
    found = [results.read(file) for file in sorted(output.glob(f"{prefix}*.json"))]
    curves = [{**curve, "label": label.format(curve["label"])} for result in found for curve in result.values["curves"]]
    return dataclasses.replace(found[0], values={"curves": curves}) if found else None


def _text(doc: str) -> str:
    """A module's docstring as Markdown: its commands become code."""
    doc = re.sub(r"\s*Ours:\s+experiments/README\.md\.", "", doc)
    return re.sub(r"(?m)^((?:python|pip|GLIBC_TUNABLES)\b.*(?:\n +.*)*)$", r"    \1", doc).replace("\n    \n", "\n\n")


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the page and its figures.

    Attributes:
        output: Folder of the result files.
    """

    output: Path = results.DIRECTORY


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.evidence", description=__doc__)
    try:
        text = page(options.output)
        for name in modules(ablations):
            for result in measured(name, options.output).values():
                report.plot(result, PAGE.parent / FIGURES / f"{result.name}.png")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    run_command(main)
