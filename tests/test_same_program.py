"""Processes of a job must compile the same program, though Python hashes strings otherwise in each."""

import os
import subprocess
import sys

import pytest
from train_helpers import ROOT

LOWER = """
import hashlib, jax, jax.numpy as jnp
from fam_jax import Decoder, presets
from lime_jax import LimeConfig
import dataclasses

model = Decoder(dataclasses.replace(presets.tiny(), mixing=LimeConfig(backward="{backward}"), remat="full"))
tokens = jnp.zeros((1, 128), jnp.int32)
params = jax.eval_shape(model.init, jax.random.key(0), tokens)
loss = lambda params: model.apply(params, tokens, targets=tokens).losses.nll.mean()
print(hashlib.sha256(jax.jit(jax.grad(loss)).lower(params).as_text().encode()).hexdigest())
"""


@pytest.mark.parametrize("backward", ["write_once", pytest.param("rebuild", marks=pytest.mark.slow)])
def test_hash_seeds_do_not_change_the_program(backward):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOWER.format(backward=backward)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1", "3")
    ]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert not any(process.returncode for process in processes)
