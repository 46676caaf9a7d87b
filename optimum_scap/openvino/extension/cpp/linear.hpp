// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "activation.hpp"
#include "kernels.hpp"

namespace scap {

/// y[i] [rows][out_i] = sum over kept channels of (x - mode) W_i[:, channel] + bias_i for x [rows][in], each row with
/// its own kept channels; the layers share x and the threshold.
void sparse_linear(const float* x, int64_t rows, Threshold threshold, const std::vector<Weights>& layers,
                   Arithmetic arithmetic, float* const* y);

/// y [rows][out] = down(sparsify_hidden(activation(first(sparsify(x))) * up(sparsify(x)))): `layers` are gate, up and
/// down, or up and down for an FFN without gate (no product).
void sparse_ffn(const float* x, int64_t rows, Threshold threshold, Threshold hidden_threshold, Activation activation,
                const std::vector<Weights>& layers, Arithmetic arithmetic, float* y);

}  // namespace scap
