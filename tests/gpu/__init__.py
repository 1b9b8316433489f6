"""Tests of what only a GPU can show: `python -m tests.gpu OUT` runs them all, and the benchmarks. See tests/README.md.

KD_GPU_REHEARSAL=1 runs them on the CPU instead, with small sizes. It shows that they can run, nothing about a GPU.
"""

import os

import torch

REHEARSAL = os.environ.get("KD_GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
