"""Configuration of the memory along time: BSWA, FAM and its rivals."""

import dataclasses

from fam_jax.checks import check_bool, check_choice, check_int, check_real

KINDS = ("fam", "feedback", "summary", "rmt", "autocompressor")
# Kinds that each option is of; those that are not here are of all.
_OF = {
    **dict.fromkeys(("fam_positions", "fam_query", "prompt_positions", "clip", "noise", "rsp"), ("fam", "summary")),
    **dict.fromkeys(("fam_ff", "fam_init", "fam_blocks", "layers"), ("fam", "summary")),
    "first_residual": ("fam",),
    "summaries": ("autocompressor",),
}
PAPER_SUMMARIES = 260  # block summaries that AutoCompressors kept in the paper's test (appendix B.4.8)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Memory along time: block sliding window attention (BSWA), Feedback Attention Memory (FAM), and FAM's rivals.

    The text is read in blocks. A token sees its own block up to itself, all of the `segments` blocks before
    it, and the FAM rows, which have read every earlier block (TransformerFAM, section 2 and algorithm 2). Kinds:

    | kind | what carries the past | paper | schedules |
    |---|---|---|---|
    | "fam" | FAM: the rows of a layer are fed back into it | section 2, algorithm 2 | all three |
    | "summary" | learned queries, the same at each block, read it and the summary before it | C.3 | all three |
    | "feedback" | keys and values of segments are made of the layer's outputs, not of its inputs | C.2 | block |
    | "rmt" | last outputs of rows behind a block are rows before the next, at the embeddings | B.4.8 | block |
    | "autocompressor" | as "rmt", but the rows of all blocks are kept, the latest `summaries` | B.4.8 | block |

    An option that a kind does not have must be left as it is. See `fam_jax.fam` and `fam_jax.rivals` for the equations.

    Attributes:
        block_size: Tokens in a block.
        segments: Cached past blocks that a token sees in full; 0 sees only its own block.
        fam_length: FAM rows per layer, at most `block_size`; 0 is plain BSWA. With "rmt" and "autocompressor" the rows
            that are written behind each block; 0 with "feedback", which has none.
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
        kind: What carries the past, see above.
        fam_ff: FAM rows pass through the feed-forward. Without, F[n] is attention and residual alone (section C.1).
        fam_init: What the FAM starts from: "prompt", embeddings that climb the layers (appendix B.1), or "prefix", rows
            of each layer (B.4.6).
        fam_blocks: Tokens see the FAM after each of the last so many blocks (table 6), and where a document has not so
            many yet, what its FAM started from. FAM rows see only the last.
        layers: Numbers of the layers that have a FAM, from 0; None is all. The others are plain BSWA, though no faster
            in calls of whole blocks, where a FAM that nobody reads is computed in them.
        summaries: "autocompressor" only: rows of so many blocks are kept, and older ones forgotten, so that the state
            has a limit; the cost of a block grows with it. No parameter depends on it, so that it can be the number of
            blocks of a text in training, and more later. None is 260, as in the paper's test.
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
    kind: str = "fam"
    fam_ff: bool = True
    fam_init: str = "prompt"
    fam_blocks: int = 1
    layers: tuple[int, ...] | None = None
    summaries: int | None = None

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
        check_choice(name, "kind", self.kind, KINDS)
        check_bool(name, "fam_ff", self.fam_ff)
        check_choice(name, "fam_init", self.fam_init, ("prompt", "prefix"))
        check_int(name, "fam_blocks", self.fam_blocks, 1)
        if self.summaries is not None:
            check_int(name, "summaries", self.summaries, 1)
        self._check_layers()
        self._check_kind()
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
            off_values = {"clip": None, "noise": 0, "rsp": 0, "fam_ff": True, "fam_init": "prompt", "fam_blocks": 1}
            for field, off in (*off_values.items(), ("layers", None)):
                if getattr(self, field) != off:
                    raise ValueError(
                        f"MemoryConfig.{field}={getattr(self, field)!r} acts on the FAM, but fam_length=0 has none; "
                        f"set {field} to {off!r}, or give the memory a FAM"
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
        if self.fam_blocks > 1 and self.prompt_positions == "pinned":
            raise ValueError(
                f"MemoryConfig.fam_blocks={self.fam_blocks} is not possible with prompt_positions='pinned', under "
                "which an earlier FAM's positions would depend on how its document began; set prompt_positions to "
                "'before'"
            )

    def _check_layers(self) -> None:
        layers = self.layers
        if layers is None:
            return
        whole = isinstance(layers, tuple) and all(type(number) is int and number >= 0 for number in layers)
        if not whole or not layers or sorted(set(layers)) != list(layers):
            raise ValueError(
                f"MemoryConfig.layers={layers!r} is not allowed; give a tuple of numbers of layers from 0, rising, "
                "each once, or None for all"
            )

    def _check_kind(self) -> None:
        kind = self.kind
        for field in dataclasses.fields(self):
            kinds, value = _OF.get(field.name, KINDS), getattr(self, field.name)
            if kind not in kinds and value != field.default:
                raise ValueError(
                    f"MemoryConfig.{field.name}={value!r} is an option of kind {' and '.join(map(repr, kinds))}, which "
                    f"kind={kind!r} does not have; leave it at {field.default!r}"
                )
        if kind == "feedback" and self.fam_length:
            raise ValueError(
                f"MemoryConfig.fam_length={self.fam_length} is not possible with kind='feedback', which has no such "
                "rows: it carries the past in its segments; set fam_length to 0"
            )
        if kind == "feedback" and not self.segments:
            raise ValueError(
                "MemoryConfig.segments=0 is not possible with kind='feedback', which carries the past in its segments; "
                "set segments to 1 or more"
            )
        if kind in ("summary", "rmt", "autocompressor") and not self.fam_length:
            raise ValueError(
                f"MemoryConfig.fam_length=0 is not possible with kind={kind!r}, which carries the past in such rows; "
                "set fam_length to 1 or more"
            )

    @property
    def rows(self) -> int:
        """Memory rows that every layer carries from block to block: the FAM's. Rivals that have none: 0."""
        return self.fam_length if self.kind in ("fam", "summary") else 0

    @property
    def kept_summaries(self) -> int:
        """Blocks whose outputs of memory rows are kept for the bottom layer: 0 but for RMT and AutoCompressors."""
        if self.kind == "autocompressor":
            return PAPER_SUMMARIES if self.summaries is None else self.summaries
        return int(self.kind == "rmt")

    @property
    def block_schedule_only(self) -> bool:
        """A block needs what other layers, or the same layer's outputs, made of the block before it."""
        return self.kind in ("feedback", "rmt", "autocompressor")
