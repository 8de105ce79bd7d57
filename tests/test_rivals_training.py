"""A training step of each kind of memory: rows that go on from step to step, in parts of the batch."""

import dataclasses

import jax
import numpy as np
import optax
from reference import mostly_slow
from train_helpers import first_state, tiny, with_model

from experiments.step import make_train_step
from fam_jax import Decoder, MemoryConfig

MEMORIES = {
    "summary": MemoryConfig(block_size=8, fam_length=2, kind="summary", rsp=0.5),
    "feedback": MemoryConfig(block_size=8, kind="feedback"),
    "rmt": MemoryConfig(block_size=8, segments=0, fam_length=2, kind="rmt"),
    "autocompressor": MemoryConfig(block_size=8, segments=0, fam_length=2, kind="autocompressor", summaries=2),
    "variants": MemoryConfig(
        block_size=8, fam_length=2, fam_ff=False, fam_init="prefix", fam_blocks=2, layers=(1,), rsp=0.5
    ),
}


@mostly_slow(MEMORIES, fast=("feedback",))
def test_steps_train_and_parts_add_up(tmp_path, name):
    memory = MEMORIES[name]
    start = {"variants": "fam_prefix", "feedback": "embed"}.get(name, "fam_prompt")
    schedule = "block" if memory.block_schedule_only else "layer"
    base = with_model(tiny(tmp_path, mode="stream"), memory=memory, schedule=schedule)
    found = []
    for parts in (1, 2):
        config = dataclasses.replace(base, accumulate=parts)
        model, optimizer = Decoder(config.model), optax.adam(1e-2)
        state = first_state(config, model, optimizer)
        step = make_train_step(config, model, optimizer, lambda step: 0.1)
        ids, losses, reached = np.random.default_rng(0).integers(0, 256, (2, 33)), [], 0.0
        for number in range(6):
            reset = np.zeros((2, 4), bool)
            reset[:, 2 * (number % 2)] = number > 0
            batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((2, 32), np.float32)}
            state, metrics = step(state, batch | {"reset": reset, "padded": np.zeros((2, 4), bool)})
            losses.append(float(metrics["loss"]))
            assert not metrics["skipped"]
            reached += float(metrics[f"grad_norm/{start}"])
        found.append((losses, jax.device_get(state.stream)))
        assert reached > 0
        assert losses[-1] < losses[0]
    (losses, stream), (others, other) = found
    if not memory.rsp:  # whose coins are drawn for each part
        np.testing.assert_allclose(others, losses, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(stream), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
