r"""PassKey of FAM and its rivals in the same decoder (TransformerFAM, sections B.4.8, C.1 to C.3, figures 7 and 9).

python -m experiments.ablate passkey_rivals --size cpu

Paper: memory segments of outputs (FM1, FM2) are better than the window and far below FAM; static summary queries fail;
RMT is below a window of one past block; AutoCompressors collapse beyond the trained length; without the feed-forward it
trained badly. All arms have as many rows and no past blocks but FM; FAM's limit to its size and its noise, which some
rivals have no place for, are off in all, and `FAM-noise` shows FAM with both. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory, with_model
from experiments.config import TrainConfig
from experiments.data.passkey import PasskeyData

SIZES = PASSKEY_SIZES
CORE = True
VERDICT = "no rival is ahead of FAM at any length; RMT, which two seeds of three learn, is not last as in the paper"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    best = passkey_base(size)
    base = with_memory(best, clip=None, noise=0.0, rsp=0.0)
    block = with_model(base, schedule="block")
    assert isinstance(best.data, PasskeyData)
    longest = best.data.blocks[-1]
    return {
        "FAM": base,
        "FAM-noise": best,
        "no-FF": with_memory(base, fam_ff=False),
        "summary": with_memory(base, kind="summary"),
        "FM1": with_memory(block, kind="feedback", fam_length=0, segments=1),
        "FM2": with_memory(block, kind="feedback", fam_length=0, segments=2),
        "RMT": with_memory(block, kind="rmt"),
        "AutoCompressor": with_memory(block, kind="autocompressor", summaries=longest),
    }


evaluation = passkey_evaluation
