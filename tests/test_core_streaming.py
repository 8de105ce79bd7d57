"""Any split of a text gives what one call gives: open blocks, per-row lengths, document starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from reference import (
    B,
    as_pretrained,
    assert_close,
    assert_trees_close,
    decoder_config,
    fam_config,
    fam_decoder,
    mostly_slow,
    params_of,
    quick_jit,
    runner,
    some_tokens,
)

from fam_jax import Decoder, StreamState

T = 6 * B
LONG = some_tokens(2, T, seed=4)
SCHEDULES = ("layer", "block")
layer_schedule = pytest.mark.parametrize("schedule", ["layer", pytest.param("block", marks=pytest.mark.slow)])
F32 = dict(dtype="float32", param_dtype="float32")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def readable(state: StreamState) -> dict[str, object]:
    """What later tokens can read of a state: nothing beyond the open block's offset, no missing segment."""
    segments = state.segment_k.shape[2]
    age = np.arange(segments)[::-1]  # the newest segment is the last
    written = (age < np.asarray(state.blocks)[:, None])[None, :, :, None, None, None]
    opened = (np.arange(state.open_k.shape[2]) < np.asarray(state.offset)[:, None])[None, :, :, None, None]
    fam = np.where(np.asarray(state.fresh)[None, :, None, None], 0.0, state.fam)
    return {
        "fam": fam,
        "offset": np.asarray(state.offset),
        "blocks": np.asarray(state.blocks),
        "fresh": np.asarray(state.fresh),
        "segment_k": np.where(written, state.segment_k, 0.0),
        "segment_v": np.where(written, state.segment_v, 0.0),
        "open_k": np.where(opened, state.open_k, 0.0),
        "open_v": np.where(opened, state.open_v, 0.0),
    }


def feed(run, params, tokens, sizes, state=None):
    """Logits of tokens [b, t] read in calls of the given sizes, and the last state."""
    parts, start = [], 0
    for size in sizes:
        out = run(params, tokens[:, start : start + size], state=state)
        parts.append(out.logits)
        state, start = out.state, start + size
    return np.concatenate(parts, axis=1), state


STREAMED = {
    "fam, absolute, fractional, pinned": fam_config(
        {"positions": "absolute", "fam_positions": "fractional", "prompt_positions": "pinned"}
    ),
    "fam, absolute, zero, two segments": fam_config(
        {"positions": "absolute", "fam_positions": "zero", "segments": 2}, schedule="block"
    ),
    "fam, all that pretrained models have": as_pretrained(fam_config({"segments": 2})),
    "bswa 2, window, parallel": decoder_config({"segments": 2, "window": 6}, parallel_block=True),
}


@mostly_slow(STREAMED, fast=("fam, absolute, zero, two segments", "fam, all that pretrained models have"))
def test_splits_equal_one_call(name, x64):
    """Token by token, and by calls shorter and longer than a block that end in an open block: logits and state."""
    config = STREAMED[name]
    params, run, length = params_of(config), runner(config), 4 * B + 1
    whole = run(params, LONG[:, :length])
    for sizes in ([1] * length, [2, B + 2, 1, B + 2, 2]):
        logits, state = feed(run, params, LONG, sizes)
        assert_close(logits, whole.logits, 1e-10, str(sizes))
        assert_trees_close(readable(state), readable(whole.state), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param("float64", 1e-10, marks=pytest.mark.slow),
        pytest.param("float32", 1e-5, marks=pytest.mark.slow),
        ("bfloat16", 2e-2),
    ],
)
def test_token_by_token_equals_one_call_in_every_precision(dtype, tolerance):
    """With the default FAM, and the model's own initial weights: larger ones amplify rounding."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        config = fam_config(dtype=dtype, param_dtype=dtype)
        run, length = runner(config), 3 * B + 1
        params = quick_jit(Decoder(config).init)(jax.random.key(1), LONG)["params"]
        whole = run(params, LONG[:, :length])
        logits, state = feed(run, params, LONG, [1] * length)
        assert state.fam.dtype == dtype
        assert_close(logits, whole.logits, tolerance)
        assert_trees_close(readable(state), readable(whole.state), tolerance)


@pytest.mark.parametrize(("schedule", "count"), [("layer", 300), pytest.param("block", 100, marks=pytest.mark.slow)])
def test_random_splits_compile_once_per_length(schedule, count):
    """The offset inside the open block is data: hundreds of splits of a text, one compilation per length of a call."""
    config = fam_config(schedule=schedule, **F32)
    model, length, longest = Decoder(config), 4 * B + 2, B + 2
    traces = []

    @quick_jit
    def run(params, tokens, state):
        traces.append(tokens.shape[1])
        return model.apply({"params": params}, tokens, state=state)

    params = jax.device_put(params_of(config))
    whole = runner(config)(params, LONG[:, :length])
    starts = [(n, i) for n in range(1, longest + 1) for i in range(length - n + 1)]
    pieces = {(n, i): jnp.asarray(LONG[:, i : i + n]) for n, i in starts}
    tolerance = 1e-5 * np.max(np.abs(whole.logits))
    splits, rng = set(), np.random.default_rng(5)
    while len(splits) < count:
        sizes = []
        while sum(sizes) < length:
            sizes.append(min(int(rng.integers(1, longest + 1)), length - sum(sizes)))
        if tuple(sizes) in splits:
            continue
        splits.add(tuple(sizes))
        state, start, parts = model.init_state(2), 0, []
        for size in sizes:
            out = run(params, pieces[size, start], state)
            parts.append(out.logits)
            state, start = out.state, start + size
        error = np.max(np.abs(np.concatenate(parts, axis=1) - whole.logits))
        assert error <= tolerance, f"{sizes}: off by {error}"
    assert sorted(traces) == list(range(1, longest + 1))
    assert_trees_close(readable(state), readable(whole.state), 1e-5)


# ------------------------------------------------------------------------------- rows of their own in a batch


class Row:
    """What one row of a stream should give: its documents, each read alone by the reference."""

    def __init__(self, config, params):
        self.config, self.params, self.document = config, params, []

    def read(self, tokens, reset):
        """Logits of one call's tokens; reset[j] starts a document at the j-th block that the call touches."""
        if reset[0]:
            self.document = []
        start, out, pending = len(self.document) % B, [], 0
        for i, token in enumerate(tokens):
            block, within = divmod(start + i, B)
            if block and within == 0 and block < len(reset) and reset[block]:
                out.append(self.tail(pending))
                self.document, pending = [], 0
            self.document.append(token)
            pending += 1
        out.append(self.tail(pending))
        return np.concatenate(out)

    def tail(self, count):
        size = self.config.vocab_size
        if not count:
            return np.zeros((0, size))
        return fam_decoder(self.params, self.config, np.array(self.document)).logits[-count:]


@pytest.mark.parametrize(
    ("schedule", "width"), [*((schedule, 2 * B + 1) for schedule in [*SCHEDULES, "wavefront"]), ("layer", B - 1)]
)
def test_lengths_and_resets_give_each_row_its_own_documents(schedule, width, x64):
    """In calls of several blocks, and in short ones, in which some rows end a block and others do not."""
    config = fam_config(schedule=schedule)
    params = params_of(config)
    run, rng = runner(config), np.random.default_rng(6)
    rows = [Row(config, params) for _ in range(5)]
    blocks = -(-width // B)
    state = Decoder(config).init_state(5)
    seen = set()
    for call in range(8 if blocks > 1 else 16):
        tokens = rng.integers(0, config.vocab_size, (5, width)).astype(np.int32)
        lengths = rng.integers(0, width + 1, 5).astype(np.int32)
        lengths[call % 5] = min(width, (0, width, 2 * B, B)[call % 4])
        reset = rng.random((5, blocks)) < 0.25
        # A document starts with a token: a block that gets none in this call is not reset.
        for r in range(5):
            start = 0 if reset[r, 0] else len(rows[r].document) % B
            reset[r] &= np.maximum(np.arange(blocks) * B - start, 0) < lengths[r]
        out = run(params, tokens, state=state, lengths=lengths, reset=reset)
        for r, row in enumerate(rows):
            before = len(row.document) % B
            want = row.read(tokens[r, : lengths[r]], reset[r])
            assert_close(out.logits[r, : lengths[r]], want, 1e-10, f"call {call}, row {r}")
            seen |= {("reset", j) for j in np.flatnonzero(reset[r]) if before} | {("length", int(lengths[r]))}
        state = out.state
        np.testing.assert_array_equal(state.offset, [len(row.document) % B for row in rows])
        np.testing.assert_array_equal(state.blocks, [len(row.document) // B for row in rows])
        np.testing.assert_array_equal(state.fresh, [len(row.document) < B for row in rows])
    happened = {("reset", min(1, blocks - 1)), ("reset", 0), ("length", 0), ("length", width)}
    assert happened <= seen  # what this is about did happen


def test_padding_is_never_read(x64):
    """What stands beyond a row's length changes neither its logits nor its state, exactly."""
    for config in (fam_config(), fam_config(schedule="block")):
        params, run = params_of(config), runner(config)
        lengths = np.array([B + 1, 2])
        outs = []
        for seed in (7, 8):
            tokens = some_tokens(2, 2 * B, seed=seed)
            for r in range(2):
                tokens[r, : lengths[r]] = LONG[r, : lengths[r]]
            outs.append(run(params, tokens, lengths=lengths))
        for r in range(2):
            np.testing.assert_array_equal(outs[0].logits[r, : lengths[r]], outs[1].logits[r, : lengths[r]])
        first, second = (readable(out.state) for out in outs)
        jax.tree.map(np.testing.assert_array_equal, first, second)


@layer_schedule
def test_a_reset_row_is_a_fresh_start_exactly(schedule, x64):
    """Bit-equal logits and state whatever was read before, in earlier calls and in the same call."""
    config = fam_config({"segments": 2}, schedule=schedule, tie_embeddings=False)
    params, run = params_of(config), runner(config)
    old = run(params, LONG[:, B : 3 * B]).state
    older = run(params, LONG[::-1, : 2 * B], lengths=np.array([B + 3, 2])).state
    reset = np.array([[True, False], [True, False]])
    tokens = LONG[:, : 2 * B]
    outs = [run(params, tokens, state=state, reset=reset) for state in (old, older)]
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)
    jax.tree.map(np.testing.assert_array_equal, *(readable(out.state) for out in outs))
    assert_close(outs[0].logits, run(params, tokens).logits)
    # In the same call: the second block starts a document in row 0 only.
    reset = np.array([[False, True], [False, False]])
    other = np.concatenate([(tokens[:, :B] + 1) % config.vocab_size, tokens[:, B:]], axis=1)
    state = Decoder(config).init_state(2)
    one, two = (run(params, text, state=state, reset=reset).logits for text in (tokens, other))
    np.testing.assert_array_equal(one[0, B:], two[0, B:])
    assert np.all(np.any(np.asarray(one[1, B:]) != np.asarray(two[1, B:]), axis=-1))


@layer_schedule
def test_no_gradient_crosses_a_reset(schedule, x64):
    config = fam_config({"segments": 2}, schedule=schedule, tie_embeddings=False)
    params, model = params_of(config), Decoder(config)
    text = np.arange(3 * B, dtype=np.int32)[None]  # every position has an embedding of its own

    @quick_jit
    def gradients(reset):
        def loss(embed, floats):
            state = before.replace(**floats)
            out = model.apply({"params": {**params, "embed": embed}}, text, state=state, reset=reset)
            return jnp.sum(out.logits[:, 2 * B :] ** 2)

        return jax.grad(loss, argnums=(0, 1))(jnp.asarray(params["embed"]), floats)

    before = runner(config)(params, LONG[:1, : 2 * B]).state
    floats = {name: getattr(before, name) for name in ("fam", "segment_k", "segment_v")}
    by_embed, by_state = gradients(np.array([[False, False, True]]))
    assert np.all(by_embed[: 2 * B] == 0)
    assert np.all(np.any(by_embed[2 * B : 3 * B] != 0, axis=1))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(by_state))
    by_embed, by_state = gradients(np.array([[False, False, False]]))
    assert np.all(np.any(by_embed[: 3 * B] != 0, axis=1))
    assert np.any(by_state["fam"] != 0)


@layer_schedule
def test_aligned_is_only_a_promise(schedule, x64):
    """Whole blocks fed with aligned=True give what they give without, resets and a ragged end included."""
    config = fam_config(schedule=schedule)
    params, run = params_of(config), runner(config)
    start = run(params, LONG[:, :B]).state
    tokens, reset = LONG[:, B : 3 * B + 2], np.array([[False, True, False], [False, False, False]])
    for lengths in (np.array([2 * B, 2 * B]), np.array([2 * B + 2, B - 1])):
        plain, aligned = (
            run(params, tokens, state=start, lengths=lengths, reset=reset, aligned=flag) for flag in (False, True)
        )
        for r, count in enumerate(lengths):
            assert_close(aligned.logits[r, :count], plain.logits[r, :count], 1e-12, f"row {r}")
        assert_trees_close(readable(aligned.state), readable(plain.state), 1e-12)


# ----------------------------------------------------------------------------------------- length and history


@layer_schedule
def test_the_same_contents_after_any_history_give_the_same_bits(schedule):
    """10, 10^4 and 10^6 tokens of history, same contents: only counters differ, no bit of a logit."""
    config = fam_config(schedule=schedule, **F32)
    params, run = params_of(config), runner(config)
    state = run(params, LONG[:, :10]).state
    outs = []
    for history in (10, 10_000 + 2, 1_000_000 + 2):
        assert history % B == 10 % B
        outs.append(run(params, LONG[:, 10:17], state=state.replace(blocks=jnp.full(2, history // B, jnp.int32))))
    for out in outs[1:]:
        np.testing.assert_array_equal(out.logits, outs[0].logits)
        np.testing.assert_array_equal(out.state.fam, outs[0].state.fam)
    assert int(outs[2].state.blocks[0]) == 1_000_000 // B + 2


# --------------------------------------------------------------------------------------- the state as a value


def test_rows_slice_and_tile(x64):
    """Read once, ask many: the rows of a state are independent."""
    config = fam_config()
    params, run = params_of(config), runner(config)
    state = run(params, LONG[:, : B + 3], lengths=np.array([B + 3, 2])).state
    order = np.array([1, 0, 0, 1])
    questions = some_tokens(4, B, seed=10)
    got = run(params, questions, state=state.rows(order))
    for i, r in enumerate(order):
        text = np.concatenate([LONG[r, : (B + 3, 2)[r]], questions[i]])
        assert_close(got.logits[i], fam_decoder(params, config, text).logits[-B:], 1e-10, f"question {i}")


def test_the_state_survives_saving(x64):
    for config in (fam_config(), decoder_config()):
        params, run = params_of(config), runner(config)
        state = Decoder(config).init_state(2, max_length=None if config.memory else T)
        state = run(params, LONG[:, : B + 1], state=state).state
        want = run(params, LONG[:, B + 1 : B + 4], state=state).logits
        through_numpy = jax.tree.map(np.asarray, state)
        blank = jax.tree.map(jnp.zeros_like, state)
        through_bytes = serialization.from_bytes(blank, serialization.to_bytes(state))
        for copy in (through_numpy, through_bytes):
            np.testing.assert_array_equal(run(params, LONG[:, B + 1 : B + 4], state=copy).logits, want)


@pytest.mark.parametrize(
    ("schedule", "split"), [("layer", B + 2), pytest.param("block", 2 * B, marks=pytest.mark.slow)]
)
def test_gradients_flow_through_a_passed_state(schedule, split, x64):
    """The gradient of two calls, split inside a block or at its edge, is the gradient of one."""
    config = fam_config(schedule=schedule, tie_embeddings=False)
    params, model = params_of(config), Decoder(config)
    text = np.arange(3 * B, dtype=np.int32)[None]
    weights = np.random.default_rng(11).standard_normal((3 * B - split, config.vocab_size))

    def one(p):
        return jnp.sum(model.apply({"params": p}, text).logits[0, split:] * weights)

    def two(p):
        state = model.apply({"params": p}, text[:, :split]).state
        return jnp.sum(model.apply({"params": p}, text[:, split:], state=state).logits[0] * weights)

    whole, parts = quick_jit(lambda p: (jax.grad(one)(p), jax.grad(two)(p)))(params)
    assert_trees_close(parts, whole, 1e-10)
    assert np.all(np.any(parts["embed"][:split] != 0, axis=1))
