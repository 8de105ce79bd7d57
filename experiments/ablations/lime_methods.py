r"""Language modelling at equal tokens: no mixing, LIMe of every kind, and other methods (LIMe, section 4).

python -m experiments.ablate lime_methods --size cpu

Paper, perplexity: 16.46 without and 15.93 with LIMe at 150M (0.033 nats), 0.012 nats at 1.2B; Hyper-Connections and
DenseFormer between. Ours: experiments/README.md.
"""

from experiments.ablations._bases import layers_base, layers_evaluation, with_model
from experiments.config import TrainConfig
from lime_jax import (
    AttentionResidualsConfig,
    DenseFormerConfig,
    DepthAttentionConfig,
    HyperConnectionsConfig,
    LimeConfig,
    ValueResidualConfig,
)

SIZES = ("cpu", "gpu", "paper")
CORE = True
VERDICT = "not reproduced in 600 steps: learned keys and values lose to no mixing; their plain average wins"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = layers_base(size)
    kinds = ("static_kv", "dynamic_kv", "static_hidden", "dynamic_hidden", "dynamic_views", "average")
    others = {
        "DenseFormer": DenseFormerConfig(),
        "Hyper-Connections": HyperConnectionsConfig(),
        "Value-Residual": ValueResidualConfig(),
        "Attention-Residuals": AttentionResidualsConfig(),
        "Depth-Attention": DepthAttentionConfig(),
    }
    mixing = {"none": None} | {f"LIMe-{kind}": LimeConfig(router=kind) for kind in kinds} | others
    return {name: with_model(base, mixing=one) for name, one in mixing.items()}


evaluation = layers_evaluation
