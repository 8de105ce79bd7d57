"""What all tests share: the platform, the precision of products, plots without a display, compiled programs."""

import gc
import os
from importlib import metadata

# Before jax starts: the tests are written for the CPU; JAX_PLATFORMS=cuda pytest runs them elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests compile hundreds of programs and run most of them once: LLVM's optimisations take more than they give, and
# so do the newer of two ways to write loops and the threads that share a program's functions, where one can choose.
# XLA aborts at a flag that it does not know, as those of the second line are from some version on.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Equality tests of two execution orders mean float32 products, also on devices whose default is lower. Tests
# that need float64 turn it on for themselves: with jax.enable_x64(True).
jax.config.update("jax_default_matmul_precision", "highest")

# Tracing makes many small objects, nearly all of which stay; looking for garbage among them every 700 takes time.
gc.set_threshold(100_000, 50, 50)

# Few tests that take minutes each, most of which start processes: if a worker began with one of these files when
# the other has nothing left to do, all would wait for it. Holds with --no-loadscope-reorder.
LONGEST = ("sharding", "restore", "faults", "quickstart", "distributed", "train_resume", "remat", "cloud", "transfer")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops what a module has compiled: a process may map only so much memory that is code."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """This process and those that a module starts keep what they compile, and find it again."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
