"""Which activations of a sample belong to padding: the one rule of every backend. Knows no framework.

A mask is about the tokens of one input, and a model may have several. The layers of an encoder, and the keys and
values of cross-attention, read the tokens of the encoder, the layers of a decoder those of the decoder, and the layers
of a vision tower none of either. Whose tokens a layer reads is decided by its module path, never by a shape that
happens to be the same.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.roles import find_role, module_path
from .samples import as_array


if TYPE_CHECKING:
    from numpy.typing import NDArray


_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention")
# Words in the names of modules that read tokens of other modalities.
_OTHER_MODALITIES = frozenset(
    ("vision", "visual", "image", "img", "video", "audio", "speech", "vpm", "apm")
    + ("qformer", "resampler", "perceiver", "projector", "connector")
)
_TEXT_TOKENS = ("input_ids", "inputs_embeds")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")
# What a decoder that runs on its own, as an exported one does, is given by the encoder.
_FROM_ENCODER = ("encoder_hidden_states", "encoder_attention_mask")
IGNORED_LABEL = -100


class Padding:
    """The tokens of one sample that are no padding, for every layer of the model that reads it.

    Args:
        inputs: the inputs by name.
        encoder_decoder: whether the model is an encoder-decoder; None if that has to be told from the sample.
        pad_token: what pads the decoder's ids where neither a mask nor labels say so.
    """

    def __init__(
        self, inputs: Mapping[str, Any], encoder_decoder: bool | None = None, pad_token: int | None = None
    ) -> None:
        inputs = {name: value for name, value in inputs.items() if value is not None}
        alone = not inputs.keys().isdisjoint(_FROM_ENCODER) and inputs.keys().isdisjoint(_DECODER_TOKENS)
        if encoder_decoder is None:
            encoder_decoder = not inputs.keys().isdisjoint((*_DECODER_TOKENS, "decoder_attention_mask"))
        self._encoder_decoder = encoder_decoder and not alone
        self._reads_text = not inputs.keys().isdisjoint(_TEXT_TOKENS)
        if self._encoder_decoder:
            self._encoder = _last_tokens(_key_mask(inputs.get("attention_mask")), inputs, _TEXT_TOKENS)
            self._decoder = _decoder_mask(inputs, self._encoder, pad_token)
        else:
            own = inputs.get("attention_mask", inputs.get("decoder_attention_mask"))
            self._encoder = _key_mask(inputs.get("encoder_attention_mask"))
            self._decoder = _last_tokens(_key_mask(own), inputs, (*_TEXT_TOKENS, "position_ids"))
        # By mask and shape: layers of one kind share their indices.
        self._rows: dict[tuple[int, tuple[int, ...]], NDArray[np.int64] | None] = {}

    def kept_rows(self, path: str, shape: Sequence[int]) -> "NDArray[np.int64] | None":
        """Which rows of the activations that enter a layer are no padding.

        Args:
            path: module path of the layer.
            shape: shape of its activations, `[..., channels]`.

        Returns:
            Indices into the activations as `[rows, channels]`; None if all rows count: there is no padding, or no mask
            for the tokens that this layer reads.
        """
        mask = self._mask_for(path)
        if mask is None:
            return None
        key = (id(mask), tuple(int(size) for size in shape[:-1]))
        if key not in self._rows:
            self._rows[key] = _matching_rows(mask, key[1])
        return self._rows[key]

    def _mask_for(self, path: str) -> "NDArray[np.bool_] | None":
        components = module_path(path).split(".")
        if self._reads_text and any(not _OTHER_MODALITIES.isdisjoint(part.split("_")) for part in components):
            return None
        if any(component in _CROSS_ATTENTION for component in components) and find_role(path) in ("k", "v"):
            return self._encoder
        if not self._encoder_decoder:
            return self._decoder
        # The decoder of an EncoderDecoderModel has a module called encoder of its own: the first name counts.
        part = next((name for name in components if name.endswith(("encoder", "decoder"))), "encoder")
        return self._decoder if part.endswith("decoder") else self._encoder


def _decoder_mask(
    inputs: Mapping[str, Any], encoder: "NDArray[np.bool_] | None", pad_token: int | None
) -> "NDArray[np.bool_] | None":
    if "decoder_attention_mask" in inputs:
        return _last_tokens(_key_mask(inputs["decoder_attention_mask"]), inputs, _DECODER_TOKENS)
    if "labels" in inputs and (labels := as_array(inputs["labels"])).ndim == 2 and labels.dtype.kind in "iu":
        # The decoder reads the labels moved by one; where it predicts nothing, it reads padding.
        return _unless_all(labels != IGNORED_LABEL)
    if "decoder_input_ids" in inputs:
        ids = as_array(inputs["decoder_input_ids"])
        return None if pad_token is None or ids.ndim != 2 else _unless_all(_before_last(ids != pad_token))
    if encoder is None or not inputs.keys().isdisjoint(_DECODER_TOKENS):
        return None
    # BART and its kin make the decoder's ids of the encoder's, moved by one.
    return _unless_all(np.concatenate([np.ones_like(encoder[:, :1]), encoder[:, :-1]], axis=1))


def _before_last(is_token: "NDArray[np.bool_]") -> "NDArray[np.bool_]":
    """The first position and all up to the last token: many a decoder starts with the token that also pads."""
    kept = np.cumsum(is_token[:, ::-1], axis=1)[:, ::-1] > 0
    kept[:, :1] = True
    return kept


def _unless_all(mask: "NDArray[np.bool_]") -> "NDArray[np.bool_] | None":
    return None if mask.all() else mask


def _key_mask(value: Any) -> "NDArray[np.bool_] | None":
    """`[batch, tokens]`, true for real tokens, from any form that attention layers take; None if none is padding."""
    if value is None or isinstance(value, Mapping):  # Gemma 2 and others take a mask per kind of layer
        return None
    mask: Any = as_array(value)
    if mask.dtype.kind not in "biuf" or not 1 <= mask.ndim <= 4:
        return None
    if mask.dtype.kind == "f" and (mask.ndim > 2 or (mask < 0).any()):
        mask = mask > -1e3  # added to the scores: 0, or a large negative number
    mask = mask.astype(bool)
    if mask.ndim > 2:  # [batch, heads, queries, keys]: what no token looks at is padding
        mask = mask.any(axis=tuple(range(1, mask.ndim - 1)))
    return _unless_all(mask.reshape(-1, mask.shape[-1]))


def _last_tokens(
    mask: "NDArray[np.bool_] | None", inputs: Mapping[str, Any], names: Sequence[str]
) -> "NDArray[np.bool_] | None":
    """`mask` for the tokens that are read now, the last ones, where it also covers those in a cache."""
    if mask is None:
        return None
    for name in names:
        shape = np.shape(inputs.get(name, ()))
        if len(shape) != (3 if name.endswith("embeds") else 2):
            continue
        if 0 < shape[1] < mask.shape[1]:
            mask = mask[:, -shape[1] :]
        if mask.shape[0] == 1 < shape[0]:  # one mask for the whole batch
            mask = np.repeat(mask, shape[0], axis=0)
        break
    return _unless_all(mask)


def _matching_rows(mask: "NDArray[np.bool_]", shape: tuple[int, ...]) -> "NDArray[np.int64] | None":
    """The kept rows of activations `[*shape, channels]`; None if their rows are not the tokens of the mask."""
    sizes = [size for size in shape if size != 1]
    tokens = [size for size in mask.shape if size != 1]
    if sizes in (tokens, [mask.size]):
        return np.flatnonzero(mask)
    if sizes == tokens[::-1]:  # [tokens, batch]
        return np.flatnonzero(mask.T)
    return None
