"""Kernels run on a GPU or, without one, in Triton's interpreter. The choice must be made before Triton is imported."""

import os

import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
