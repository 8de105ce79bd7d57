"""Model shapes by name. `palm_*` are those of TransformerFAM's table 3, with the paper's default memory;
`smollm2_135m` is that of a pretrained model.

The paper's parameter counts, embeddings not counted: 1.19B, 8.59B and 24.49B. The paper's 256k vocabulary adds 0.4B to
1.1B. Change anything with `dataclasses.replace`.
"""

from fam_jax.config import DecoderConfig, MemoryConfig

_VOCAB = 256_000
# Section 2.1 (block), table 4 (memory segments, FAM length, RSP).
_PAPER_MEMORY = MemoryConfig(block_size=1024, segments=3, fam_length=64, rsp=0.8)


def tiny(vocab_size: int = 256) -> DecoderConfig:
    """A FAM model for tests and first tries: 2 layers, width 64, 0.1M parameters without embeddings."""
    return DecoderConfig(
        vocab_size=vocab_size,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        d_ff=128,
        memory=MemoryConfig(block_size=16, segments=1, fam_length=4),
    )


def _palm(num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, ff_multiplier: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=_VOCAB,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        d_ff=ff_multiplier * d_model,
        memory=_PAPER_MEMORY,
        dtype="bfloat16",
        remat="full",
    )


def palm_1b() -> DecoderConfig:
    """The paper's 1B model: 18 layers, width 1536, 12 heads."""
    return _palm(num_layers=18, d_model=1536, num_heads=12, num_kv_heads=12, ff_multiplier=8)


def palm_8b() -> DecoderConfig:
    """The paper's 8B model: 32 layers, width 4096, 32 heads."""
    return _palm(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, ff_multiplier=4)


def palm_24b() -> DecoderConfig:
    """The paper's 24B model: 56 layers, width 4096, 32 query heads and one key/value head."""
    return _palm(num_layers=56, d_model=4096, num_heads=32, num_kv_heads=1, ff_multiplier=8)


def smollm2_135m() -> DecoderConfig:
    """SmolLM2-135M: 30 layers, width 576, 9 query heads and 3 key/value heads; full attention."""
    return DecoderConfig(
        vocab_size=49_152,
        num_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        rope_base=100_000.0,
        norm_eps=1e-5,
    )
