"""Passes over calibration data, made fast: quantized layers through the C++ operation.

OpenVINO's own operation in f32 reads text at a third of the speed that it has by default, where it quantizes
activations to 8 bits. Ours splits activations into two 8-bit parts, which is near that speed and within 1e-3 of f32.
"""

import logging

import openvino as ov

from .extension.build import ExtensionBuildError, build_extension
from .extension.packing import BufferPool, is_fast_for_dense_int4
from .fuse.layer import Workshop
from .fuse.linear import find_dense_layers, fuse_dense_layers
from .mapped_files import MappedFiles
from .weights import is_integer


logger = logging.getLogger(__name__)


def speed_up(model: ov.Model) -> ov.Model:
    """Has the layers of INT8 and INT4 weights of `model` run as the C++ operation, in place, where that is faster.

    What is pruned is still up to the model's own operations. Without a compiler the model stays as it is.

    Returns:
        `model` itself.
    """
    try:
        library = build_extension()
    except ExtensionBuildError as reason:
        logger.debug("calibration runs on OpenVINO's own operations: %s", reason)
        return model
    if is_fast_for_dense_int4(library):
        workshop = Workshop(library, "split", BufferPool(), MappedFiles())
        fused = fuse_dense_layers(find_dense_layers(model, is_integer), workshop)
        logger.debug("calibration runs %d layers as SCAPLinear", len(fused))
        model.validate_nodes_and_infer_types()
    return model
