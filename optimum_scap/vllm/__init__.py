"""Sparse checkpoints in vLLM, which finds `register` through the entry point group `vllm.general_plugins`.

`plan` reads the checkpoint's parameters and `operation` computes; neither needs vLLM. `quantization` is what vLLM
calls.
"""


def register() -> None:
    """Makes `quant_method: "scap"` known to vLLM; called by it in each of its processes."""
    from . import quantization  # noqa: F401  registers itself
