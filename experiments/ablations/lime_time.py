r"""Language modelling at equal time: no mixing, LIMe of every kind, and other methods (LIMe, section 4).

python -m experiments.ablate lime_time --size cpu

As lime_methods, but that each arm makes fewer steps than no mixing in the ratio of their shortest times of a gradient
step, so that all train equally long on the CPU where `experiments/results/lime-time.json` was measured, by

python -m experiments.benchmark time --no-scan --depths 8 --width 64 --d-ff 192 --tokens 128 --batch-size 8 --steps 20 \
    --name lime-time --arms none "static_kv, write_once" dynamic_kv static_hidden dynamic_hidden dynamic_views average \
    DenseFormer Hyper-Connections "Value Residual" "Attention Residuals" Depth-Attention

Paper: no loss at equal time; the 1.2B model with LIMe takes 1.2 to 1.6 % longer. Ours: experiments/README.md.
"""

import dataclasses

from experiments import results
from experiments.ablations import lime_methods
from experiments.config import TrainConfig

SIZES = ("cpu",)
CORE = False
VERDICT = "not as in the paper at this size: no mixing is ahead at equal time (1.625), Value-Residual (1.633) next"
STEPS = 900  # without mixing


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    curves = results.read(results.DIRECTORY / "lime-time.json").values["curves"]
    seconds = {curve["label"].partition(",")[0].replace(" ", "-"): min(curve["seconds"]) for curve in curves}
    return {
        name: dataclasses.replace(config, steps=round(STEPS * seconds["none"] / seconds[name.removeprefix("LIMe-")]))
        for name, config in lime_methods.arms(size).items()
    }


evaluation = lime_methods.evaluation
