"""Configuration of the decoder and of its memory along time.

Configs are frozen and hashable, so they can be static arguments of `jax.jit`. A wrong value is a
`ValueError` that names the field, the value and what is allowed.
"""

import dataclasses
from typing import Any

import numpy as np

from fam_jax.ops import ACTIVATIONS
from fam_jax.remat import POLICIES
from fam_jax.rope import RopeScaling
from fam_jax.sharding import FSDP_TP, ShardingRules
from lime_jax import MixingConfig, make_mixer
from lime_jax.mixer import shape_of

DTYPES = ("float32", "bfloat16", "float64")


def check_choice(owner: str, field: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}.{field}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def check_int(owner: str, field: str, value: Any, minimum: int) -> None:
    """Raises a ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{owner}.{field}={value!r} is not allowed; it must be an integer of at least {minimum}")


def check_bool(owner: str, field: str, value: Any) -> None:
    """Raises a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}.{field}={value!r} is not allowed; it must be True or False")


def check_real(owner: str, field: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises a ValueError unless `low <= value <= high`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == float("inf"):
        limit = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{owner}.{field}={value!r} is not allowed; it must be a finite number {limit}")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Memory along time: block sliding window attention (BSWA) and Feedback Attention Memory (FAM).

    The text is read in blocks. A token sees its own block up to itself, all of the `segments` blocks before
    it, and the FAM rows, which have read every earlier block (TransformerFAM, section 2 and algorithm 2).

    Attributes:
        block_size: Tokens in a block.
        segments: Cached past blocks that a token sees in full; 0 sees only its own block.
        fam_length: FAM rows per layer, at most `block_size`; 0 is plain BSWA.
        positions: "local" rotates by positions relative to the current block, which loses no precision
            however long the text; "absolute" counts from the start of the document.
        fam_positions: Rotary positions of FAM rows: the "last" slots of the block that they compressed,
            "fractional" ones just after it, or always "zero" (table 7). "zero" needs absolute positions.
        fam_query: Slot of the FAM query: "new", the end of the block being compressed, or "old", that of
            its key. The paper does not say which.
        prompt_positions: Positions of the learned initial FAM: "before" the document, or "pinned" at
            0..fam_length-1 whatever the offset, which needs absolute positions.
        first_residual: Residual of the first update from the prompt: "zero" (appendix B.1) or "fam".
        stop_gradient: Cut the gradient into cached segments (the paper's M1_SG).
        window: A token sees only keys less than this many positions back, which makes BSWA the sliding
            window of Transformer-XL. At most `segments * block_size + 1`. FAM rows are always seen.
        clip: Largest root mean square of a FAM row; after every update, larger ones are scaled down to it. Our
            addition: the residual otherwise lets the FAM grow with every block, until nothing new can be written
            into it. None does not clip.
        noise: Training only: after every update, Gaussian noise of this size relative to the FAM.
        rsp: Training only: Random State Passing, the probability that a document starts from the stored FAM
            instead of the prompt (appendix B.2.3; the paper uses 0.8).
        rpo: Training only: Random Position Offset (appendix B.2.2). Rotary attention does not notice a common
            offset, so it needs absolute positions together with something that stays in place.
    """

    block_size: int
    segments: int = 1
    fam_length: int = 0
    positions: str = "local"
    fam_positions: str = "last"
    fam_query: str = "new"
    prompt_positions: str = "before"
    first_residual: str = "zero"
    stop_gradient: bool = False
    window: int | None = None
    clip: float | None = None
    noise: float = 0.0
    rsp: float = 0.0
    rpo: bool = False

    def __post_init__(self) -> None:
        name = "MemoryConfig"
        check_int(name, "block_size", self.block_size, 1)
        check_int(name, "segments", self.segments, 0)
        check_int(name, "fam_length", self.fam_length, 0)
        check_choice(name, "positions", self.positions, ("local", "absolute"))
        check_choice(name, "fam_positions", self.fam_positions, ("last", "fractional", "zero"))
        check_choice(name, "fam_query", self.fam_query, ("new", "old"))
        check_choice(name, "prompt_positions", self.prompt_positions, ("before", "pinned"))
        check_choice(name, "first_residual", self.first_residual, ("zero", "fam"))
        check_bool(name, "stop_gradient", self.stop_gradient)
        if self.clip is not None:
            check_real(name, "clip", self.clip, 1e-6)
        check_real(name, "noise", self.noise, 0.0)
        check_real(name, "rsp", self.rsp, 0.0, 1.0)
        check_bool(name, "rpo", self.rpo)
        if self.fam_length > self.block_size:
            raise ValueError(
                f"MemoryConfig.fam_length={self.fam_length} is longer than block_size={self.block_size}; "
                "FAM rows take the last positions of a block, so at most block_size of them fit"
            )
        if self.window is not None:
            check_int(name, "window", self.window, 1)
            if self.window > self.segments * self.block_size + 1:
                raise ValueError(
                    f"MemoryConfig.window={self.window} reaches beyond the cached keys; with segments={self.segments} "
                    f"and block_size={self.block_size} it is at most segments * block_size + 1 = "
                    f"{self.segments * self.block_size + 1}; add segments or make the window smaller"
                )
        if not self.fam_length:
            for field, off in (("clip", None), ("noise", 0), ("rsp", 0)):
                if getattr(self, field) != off:
                    raise ValueError(
                        f"MemoryConfig.{field}={getattr(self, field)!r} acts on the FAM, but fam_length=0 has none; "
                        f"set {field} to {off}, or give the memory a FAM"
                    )
        if self.positions != "absolute":
            for field, needs in (
                ("fam_positions", self.fam_positions == "zero"),
                ("prompt_positions", self.prompt_positions == "pinned"),
                ("rpo", self.rpo),
            ):
                if needs:
                    value = getattr(self, field)
                    raise ValueError(
                        f"MemoryConfig.{field}={value!r} needs positions='absolute', not {self.positions!r}"
                    )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of the PaLM-style decoder (TransformerFAM, table 3 and section 2).

    Attributes:
        vocab_size: Rows of the embedding.
        num_layers: Layers.
        d_model: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; `num_heads` is multi-head, 1 multi-query, anything between grouped.
        head_dim: Width of a head; even, because rotary positions turn pairs.
        d_ff: Hidden width of the gated feed-forward.
        memory: Memory along time; None is full causal attention.
        mixing: Mixing along depth, a config of `lime_jax`; None is none.
        schedule: "layer" runs all blocks of a layer at once and only the FAM in sequence; "block" runs all
            layers of a block before the next. They compute the same function.
        parallel_block: Attention and feed-forward read one norm and are added together, as in PaLM.
        activation: Of the feed-forward's gate: "silu", or "gelu", its tanh approximation.
        attention_bias: Queries, keys and values have a bias.
        post_norms: RMSNorm on what attention and feed-forward give, before it is added, besides that on what they get.
        qk_norm: RMSNorm on queries and keys, after mixing and before the rotation.
        tie_embeddings: Reuse the embedding as output weights.
        attention_softcap: Attention scores s become c tanh(s / c); None leaves them.
        logit_softcap: The same of the output logits.
        rope_base: Base of the rotary wavelengths.
        rope_scaling: How they were stretched for longer texts; None if they were not.
        local_window: In local layers a token sees only keys less than this many positions back, besides the FAM; None
            if no layer is local.
        local_layers: For each layer whether it is local; empty if all are, once there is a `local_window`.
        local_rope_base: Base of the wavelengths, which are not scaled, in local layers; None is as everywhere.
        norm_eps: Added to the mean square in RMSNorm.
        dtype: Type of activations, memory and matrix products. Softmax and norms use at least float32.
        param_dtype: Type of the parameters.
        remat: What of a layer is kept for the backward pass, the rest being computed again there: "none" computes
            nothing again, "dots" keeps the products with weights, "attention" queries, keys, values and what attention
            gives, "full" the layer's input, and the FAM (see `fam_jax.remat`). A scanned stack that mixes layers by
            another way than "push" always computes layers again, so that it takes "none" or "full", of which the latter
            also has attention's scores of one block at a time.
        scan_layers: One compiled layer in a `jax.lax.scan`; False unrolls them. Same parameters either way.
        sharding: What is spread over which axis of the mesh, if there is one; see `fam_jax.sharding`.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    memory: MemoryConfig | None = None
    mixing: MixingConfig | None = None
    schedule: str = "layer"
    parallel_block: bool = False
    activation: str = "silu"
    attention_bias: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope_base: float | None = None
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    sharding: ShardingRules = FSDP_TP

    def __post_init__(self) -> None:
        name = "DecoderConfig"
        for field in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            check_int(name, field, getattr(self, field), 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim={self.head_dim} is odd; rotary positions need an even width")
        if self.memory is not None and not isinstance(self.memory, MemoryConfig):
            raise ValueError(f"DecoderConfig.memory={self.memory!r} is not allowed; give a MemoryConfig or None")
        check_choice(name, "activation", self.activation, tuple(ACTIVATIONS))
        check_choice(name, "schedule", self.schedule, ("layer", "block"))
        check_choice(name, "remat", self.remat, tuple(POLICIES))
        check_choice(name, "dtype", self.dtype, DTYPES)
        check_choice(name, "param_dtype", self.param_dtype, DTYPES)
        if self.mixing is not None and not isinstance(self.mixing, MixingConfig):
            raise ValueError(f"DecoderConfig.mixing={self.mixing!r} is not allowed; give a config of lime_jax, or None")
        for field in ("parallel_block", "attention_bias", "post_norms", "qk_norm", "tie_embeddings", "scan_layers"):
            check_bool(name, field, getattr(self, field))
        mixer = make_mixer(self.mixing, shape_of(self))
        if self.remat in ("dots", "attention") and self.scan_layers and mixer.per_layer and mixer.backward != "push":
            raise ValueError(
                f"DecoderConfig.remat={self.remat!r} is not possible with mixing={self.mixing!r}, whose scanned layers "
                "are always computed again as a whole; use 'none' or 'full', backward='push' where the mixing has it, "
                "or scan_layers=False"
            )
        if not isinstance(self.sharding, ShardingRules):
            raise ValueError(f"DecoderConfig.sharding={self.sharding!r} is not allowed; give ShardingRules")
        check_real(name, "rope_base", self.rope_base, 1.0)
        check_real(name, "norm_eps", self.norm_eps, 0.0)
        for field in ("attention_softcap", "logit_softcap"):
            if getattr(self, field) is not None:
                check_real(name, field, getattr(self, field), 1e-3)
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"DecoderConfig.rope_scaling={self.rope_scaling!r} is not allowed; give a RopeScaling")
        self._check_local()

    def _check_local(self) -> None:
        name = "DecoderConfig"
        if self.local_window is not None:
            check_int(name, "local_window", self.local_window, 1)
        if self.local_rope_base is not None:
            check_real(name, "local_rope_base", self.local_rope_base, 1.0)
        flags = isinstance(self.local_layers, tuple) and all(isinstance(flag, bool) for flag in self.local_layers)
        if not flags or len(self.local_layers) not in (0, self.num_layers):
            raise ValueError(
                f"DecoderConfig.local_layers={self.local_layers!r} is not allowed; give a tuple of num_layers="
                f"{self.num_layers} times True or False, or an empty one"
            )
        for field, off in (("local_layers", ()), ("local_rope_base", None)):
            if self.local_window is None and getattr(self, field) != off:
                raise ValueError(
                    f"DecoderConfig.{field}={getattr(self, field)!r} is of local layers, of which there are none "
                    f"without local_window; set that, or {field} to {off}"
                )

    @property
    def is_local(self) -> tuple[bool, ...]:
        """For each layer whether it is local."""
        return self.local_layers or (self.local_window is not None,) * self.num_layers

    @property
    def fam_length(self) -> int:
        """FAM rows per layer; 0 without a FAM."""
        return self.memory.fam_length if self.memory else 0

    @property
    def segments(self) -> int:
        """Cached past blocks; 0 for full attention."""
        return self.memory.segments if self.memory else 0
