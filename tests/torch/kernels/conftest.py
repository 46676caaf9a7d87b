"""The same tests run on a GPU and, in Triton's interpreter, without one. The choice must be made before Triton is
imported.
"""

import os

import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
