"""Configuration of the decoder.

Configs are frozen and hashable, so they can be static arguments of `jax.jit`. A wrong value is a
`ValueError` that names the field, the value and what is allowed.
"""

import dataclasses

from fam_jax import cudnn, splash
from fam_jax.checks import check_bool, check_choice, check_int, check_real
from fam_jax.memory import MemoryConfig
from fam_jax.ops import ACTIVATIONS, WEIGHTS
from fam_jax.remat import POLICIES
from fam_jax.rope import RopeScaling
from fam_jax.sharding import FSDP_TP, ShardingRules
from lime_jax import MixingConfig, make_mixer
from lime_jax.mixer import shape_of

DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of a trained model (TransformerFAM, section 3.1); see `fam_jax.lora`.

    Attributes:
        rank: Inner width of the two matrices that are added to a weight; 64 in the paper.
        alpha: Their product is added times alpha / rank; None is `rank`, so that it is added as it is.
        targets: Weights to which they are added; the paper names attention and feed-forward.
        dropout: Training only: share of the inputs of the first matrix that a step leaves out.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = tuple(WEIGHTS)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        name = "LoraConfig"
        check_int(name, "rank", self.rank, 1)
        if self.alpha is not None:
            check_real(name, "alpha", self.alpha, 1e-6)
        good = isinstance(self.targets, tuple) and self.targets and set(self.targets) <= set(WEIGHTS)
        if not good or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"LoraConfig.targets={self.targets!r} is not allowed; it must be a tuple of some of "
                f"{', '.join(map(repr, WEIGHTS))}, each once"
            )
        check_real(name, "dropout", self.dropout, 0.0)
        if self.dropout >= 1:
            raise ValueError(f"LoraConfig.dropout={self.dropout!r} is not allowed; it must be below 1")

    @property
    def scale(self) -> float:
        """What the product is added times."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


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
        lora: Low-rank changes to the weights of layers, which are trained in place of all else; None is none.
        schedule: "layer" runs all blocks of a layer at once and only the FAM in sequence; "block" runs all
            layers of a block before the next; "wavefront" runs layer l at block t beside layer l + 1 at block t - 1,
            for reading one long text on a device that one block does not fill. They compute the same function. The
            wavefront scans its diagonals whatever `scan_layers` and a mixing's `backward` say.
        parallel_block: Attention and feed-forward read one norm and are added together, as in PaLM.
        activation: Of the feed-forward's gate: "silu", or "gelu", its tanh approximation.
        attention_bias: Queries, keys and values have a bias.
        post_norms: RMSNorm on what attention and feed-forward give, before it is added, besides that on what they get.
        qk_norm: RMSNorm on queries and keys, after mixing and before the rotation.
        kv_init: Weights of keys and values begin this many times as large as those of queries. LIMe's published code
            begins them at 0.64 of what its baseline has (uniform up to 1 / sqrt(d_model), against 0.02 at width 2,048).
        tie_embeddings: Reuse the embedding as output weights.
        attention: What computes attention of whole blocks, or of a whole text: "xla" products and a softmax; "cudnn"
            the fused kernels of NVIDIA GPUs (see `fam_jax.cudnn`), except where blocks of a text are spread over
            devices; "splash" those of TPUs (see `fam_jax.splash`); "auto" cuDNN's where they can, on one device, else
            "xla". FAM rows, and calls shorter than a block or than the cache of full attention, always use "xla". They
            compute the same function.
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
            another way than "push" or "pull" always computes layers again, so that it takes "none" or "full", of which
            the latter also has attention's scores of one block at a time.
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
    lora: LoraConfig | None = None
    schedule: str = "layer"
    parallel_block: bool = False
    activation: str = "silu"
    attention_bias: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    kv_init: float = 1.0
    tie_embeddings: bool = True
    attention: str = "auto"
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
        if self.lora is not None and not isinstance(self.lora, LoraConfig):
            raise ValueError(f"DecoderConfig.lora={self.lora!r} is not allowed; give a LoraConfig or None")
        check_choice(name, "activation", self.activation, tuple(ACTIVATIONS))
        check_choice(name, "attention", self.attention, ("auto", "xla", "cudnn", "splash"))
        check_choice(name, "schedule", self.schedule, ("layer", "block", "wavefront"))
        check_choice(name, "remat", self.remat, tuple(POLICIES))
        check_choice(name, "dtype", self.dtype, DTYPES)
        check_choice(name, "param_dtype", self.param_dtype, DTYPES)
        if self.mixing is not None and not isinstance(self.mixing, MixingConfig):
            raise ValueError(f"DecoderConfig.mixing={self.mixing!r} is not allowed; give a config of lime_jax, or None")
        for field in ("parallel_block", "attention_bias", "post_norms", "qk_norm", "tie_embeddings", "scan_layers"):
            check_bool(name, field, getattr(self, field))
        mixer = make_mixer(self.mixing, shape_of(self))
        whole = self.scan_layers and mixer.per_layer and mixer.backward not in ("push", "pull")
        if self.remat in ("dots", "attention") and whole:
            raise ValueError(
                f"DecoderConfig.remat={self.remat!r} is not possible with mixing={self.mixing!r}, whose scanned layers "
                "are always computed again as a whole; use 'none' or 'full', backward='pull' where the mixing has it, "
                "or scan_layers=False"
            )
        self._check_memory()
        if not isinstance(self.sharding, ShardingRules):
            raise ValueError(f"DecoderConfig.sharding={self.sharding!r} is not allowed; give ShardingRules")
        check_real(name, "rope_base", self.rope_base, 1.0)
        check_real(name, "norm_eps", self.norm_eps, 0.0)
        check_real(name, "kv_init", self.kv_init, 0.0)
        for field in ("attention_softcap", "logit_softcap"):
            if getattr(self, field) is not None:
                check_real(name, field, getattr(self, field), 1e-3)
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"DecoderConfig.rope_scaling={self.rope_scaling!r} is not allowed; give a RopeScaling")
        self._check_local()
        kernels = {"cudnn": cudnn, "splash": splash}.get(self.attention)
        reason = None if kernels is None else kernels.obstacle(self)
        if reason is not None:
            raise ValueError(
                f"DecoderConfig.attention={self.attention!r} is not possible with {reason}; change that, or set "
                "attention to 'auto' or 'xla'"
            )

    def _check_memory(self) -> None:
        memory = self.memory
        if memory is None:
            return
        if memory.block_schedule_only and self.schedule != "block":
            raise ValueError(
                f"DecoderConfig.schedule={self.schedule!r} is not possible with memory.kind={memory.kind!r}, which "
                "needs all layers of a block before the next block; set schedule to 'block'"
            )
        if self.mixing is not None and memory.kind in ("feedback", "summary"):
            raise ValueError(
                f"DecoderConfig.mixing={self.mixing!r} is not possible with memory.kind={memory.kind!r}, of whose rows "
                "it is not defined what they read of other layers; set mixing to None, or choose another kind"
            )
        if memory.layers is None:
            return
        if memory.layers[-1] >= self.num_layers:
            raise ValueError(
                f"DecoderConfig.memory.layers={memory.layers!r} is not allowed; num_layers={self.num_layers} has the "
                f"layers 0 to {self.num_layers - 1}"
            )
        if make_mixer(self.mixing, shape_of(self)).mixes_rows:
            raise ValueError(
                f"DecoderConfig.memory.layers={memory.layers!r} is not possible with mixing={self.mixing!r}, by which "
                "FAM rows read those of all earlier layers; set layers to None, or choose another mixing"
            )

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
        return self.memory.rows if self.memory else 0

    @property
    def segments(self) -> int:
        """Cached past blocks; 0 for full attention."""
        return self.memory.segments if self.memory else 0
