"""Settings that all tests share: the platform, the precision of products, plots without a display."""

import os

# Before jax starts: the tests are written for the CPU; JAX_PLATFORMS=cuda pytest runs them elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests compile hundreds of programs and run most of them once: LLVM's optimisations take more than they give.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

# Equality tests of two execution orders mean float32 products, also on devices whose default is lower. Tests
# that need float64 turn it on for themselves: with jax.enable_x64(True).
jax.config.update("jax_default_matmul_precision", "highest")
