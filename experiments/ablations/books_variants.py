r"""Loss in books of other forms of FAM: its start, positions, length and layers (TransformerFAM, B.4.1 to B.4.6).

python -m experiments.ablate books_variants --size cpu

Paper (1B, PG-19, figure 5 and table 7): a learned start for each layer (`prefix`) is worse than a prompt that climbs
the layers; next-token accuracy is 47.7 with FAM rows at the last slots of their block, 47.6 at fractions of a position
and 47.3 at zero. FAM lengths and earlier FAMs in sight were tried on other tasks: 64 rows are best, and one FAM is
enough. FAM in some layers only is not told. Ours: experiments/README.md.
"""

from experiments.ablations._bases import books_base, books_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "2 rows 1.679, 8 rows 1.687, 32 rows 1.733; two FAMs in sight 1.703; starts, places, layers hardly matter"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = books_base(size)
    assert base.model.memory is not None
    rows, half = base.model.memory.fam_length, base.model.num_layers // 2
    return {
        "FAM": base,
        "prefix": with_memory(base, fam_init="prefix"),
        "fractional": with_memory(base, fam_positions="fractional"),
        "zero": with_memory(base, fam_positions="zero", positions="absolute"),
        f"N{rows // 4}": with_memory(base, fam_length=rows // 4),
        f"N{rows * 4}": with_memory(base, fam_length=rows * 4),
        "blocks-2": with_memory(base, fam_blocks=2),
        "blocks-4": with_memory(base, fam_blocks=4),
        "lower-layers": with_memory(base, layers=tuple(range(half))),
        "upper-layers": with_memory(base, layers=tuple(range(half, base.model.num_layers))),
    }


evaluation = books_evaluation
