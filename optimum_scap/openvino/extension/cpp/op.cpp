// SPDX-License-Identifier: Apache-2.0
#include "op.hpp"

#include <openvino/core/op_extension.hpp>

namespace scap {
namespace {

// The bytes of a layer of this many inputs and outputs can be counted in 64 bits; no layer comes near.
constexpr int64_t kMaxFeatures = int64_t(1) << 28;

ov::Shape leading_shape(const ov::Tensor& x, int64_t in_features, int64_t* rows) {
    ov::Shape shape = x.get_shape();
    OPENVINO_ASSERT(x.get_element_type() == ov::element::f32 && !shape.empty() &&
                        static_cast<int64_t>(shape.back()) == in_features,
                    "optimum_scap: x must be f32 [..., ", in_features, "]");
    shape.pop_back();
    *rows = static_cast<int64_t>(ov::shape_size(shape));
    return shape;
}

int64_t row_count(const ov::Shape& shape) {
    return static_cast<int64_t>(ov::shape_size(shape.begin(), shape.end() - 1));
}

float* set_output(ov::Tensor& output, ov::Shape shape, int64_t out_features) {
    shape.push_back(static_cast<size_t>(out_features));
    output.set_shape(shape);
    return output.data<float>();
}

}  // namespace

Threshold SparseOp::threshold_for(const ov::Shape& shape, float mode, float threshold, const float* scale) const {
    // Paged attention hands each token to us as a sequence of its own: there the number of rows decides.
    const bool decodes = shape.size() < 2 || (shape[shape.size() - 2] == 1 && row_count(shape) <= kFewRows);
    const bool dense = attributes().decode_only && !decodes;
    // A scale may be 0, which no threshold lets through.
    return dense ? Threshold{mode} : Threshold{mode, threshold, scale};
}

void SparseOp::make_plan() {
    if (plan_ != nullptr && !is_stale_) {
        return;
    }
    auto plan = std::make_shared<Plan>();
    plan->attributes = parse_attributes();
    check_attributes(plan->attributes);
    plan->layers = plan_layers(plan->attributes);
    plan->scale_sizes = plan_scales(plan->attributes);
    plan_ = plan;
    is_stale_ = false;
}

std::vector<int64_t> SparseOp::plan_scales(const Attributes& attributes) const {
    std::vector<int64_t> sizes;
    if (attributes.scales_input) {
        sizes.push_back(attributes.in_features);
    }
    if (attributes.scales_hidden) {
        sizes.push_back(layer_in_features(attributes, attributes.out_features.size() - 1));
    }
    return sizes;
}

std::vector<Weights> SparseOp::plan_layers(const Attributes& attributes) const {
    const size_t count = attributes.out_features.size();
    for (const size_t size : {attributes.weight_types.size(), attributes.scale_types.size(),
                              attributes.group_sizes.size(), attributes.zero_points.size(),
                              attributes.has_bias.size()}) {
        NODE_VALIDATION_CHECK(this, size == count, "per-layer attributes must all have ", count, " entries");
    }
    NODE_VALIDATION_CHECK(this, attributes.in_features > 0 && attributes.in_features <= kMaxFeatures,
                          "in_features out of range");
    NODE_VALIDATION_CHECK(this, attributes.threshold >= 0.0f, "threshold must not be negative");
    std::vector<Weights> layers;
    for (size_t i = 0; i < count; ++i) {
        NODE_VALIDATION_CHECK(this, attributes.out_features[i] > 0 && attributes.out_features[i] <= kMaxFeatures,
                              "out_features out of range");
        NODE_VALIDATION_CHECK(this, attributes.group_sizes[i] >= 0,
                              "group_sizes must not be negative; 0 is one group");
        NODE_VALIDATION_CHECK(this, attributes.has_bias[i] == 0 || attributes.has_bias[i] == 1,
                              "has_bias must be 0 or 1");
        Weights weights;
        weights.type = attributes.weight_types[i];
        weights.scale_type = attributes.scale_types[i];
        weights.in_features = layer_in_features(attributes, i);
        weights.out_features = attributes.out_features[i];
        weights.group_size = weights.in_features;
        const int64_t zero_point = attributes.zero_points[i];
        if (is_quantized(weights.type)) {
            const int64_t largest = (int64_t(1) << bits(weights.type)) - 1;
            NODE_VALIDATION_CHECK(this, zero_point >= -1 && zero_point <= largest, "zero_points must lie in [0, ",
                                  largest, "], or be -1 where the buffer holds them; got ", zero_point);
            weights.has_zero_points = zero_point == -1;
            weights.zero_point = static_cast<int32_t>(std::max<int64_t>(zero_point, 0));
            if (attributes.group_sizes[i] != 0) {
                weights.group_size = std::min(attributes.group_sizes[i], weights.in_features);
            }
        } else {
            NODE_VALIDATION_CHECK(this, zero_point == 0 && attributes.group_sizes[i] == 0,
                                  "float weights have no zero_points and no group_sizes: both must be 0");
        }
        weights.has_bias = attributes.has_bias[i] == 1;
        layers.push_back(weights);
    }
    return layers;
}

void SparseOp::check_inputs() const {
    const size_t count = plan_->layers.size();
    const std::vector<int64_t>& scales = plan_->scale_sizes;
    const size_t inputs = 1 + count + scales.size();
    NODE_VALIDATION_CHECK(this, get_input_size() == inputs, "needs x and one buffer per layer",
                          scales.empty() ? "" : " and the scales", ": ", inputs, " inputs, got ", get_input_size());
    const auto check = [&](size_t at, const ov::element::Type& type, int64_t size) {
        const ov::PartialShape& shape = get_input_partial_shape(at);
        NODE_VALIDATION_CHECK(this,
                              get_input_element_type(at) == type && shape.is_static() && shape.size() == 1 &&
                                  shape[0].get_length() == size,
                              "input ", at, " must be ", type, " [", size, "], got ", get_input_element_type(at), " ",
                              shape);
    };
    for (size_t i = 0; i < count; ++i) {
        check(1 + i, ov::element::u8, plan_->layers[i].buffer_bytes());
    }
    for (size_t i = 0; i < scales.size(); ++i) {
        check(1 + count + i, ov::element::f32, scales[i]);
    }
    const auto& type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type.is_dynamic(), "x must be f32, got ", type);
}

ov::PartialShape SparseOp::output_shape(int64_t out_features) const {
    ov::PartialShape shape = get_input_partial_shape(0);
    if (shape.rank().is_dynamic()) {
        return shape;
    }
    NODE_VALIDATION_CHECK(this, shape.size() >= 1, "x must have at least one dimension");
    ov::Dimension& last = shape[shape.size() - 1];
    NODE_VALIDATION_CHECK(this, last.compatible(attributes().in_features),
                          "x must end in in_features = ", attributes().in_features, ", got ", shape);
    last = out_features;
    return shape;
}

SparseOp::Bound SparseOp::bind(const ov::TensorVector& inputs) const {
    OPENVINO_ASSERT(plan_ != nullptr, "optimum_scap: evaluated before it was validated");
    const std::vector<int64_t>& scales = plan_->scale_sizes;
    Bound bound{plan_->layers};
    OPENVINO_ASSERT(inputs.size() == 1 + bound.layers.size() + scales.size(), "optimum_scap: wrong number of inputs");
    for (size_t i = 0; i < bound.layers.size(); ++i) {
        const ov::Tensor& tensor = inputs[1 + i];
        const int64_t bytes = bound.layers[i].buffer_bytes();
        OPENVINO_ASSERT(tensor && static_cast<int64_t>(tensor.get_byte_size()) == bytes, "optimum_scap: input ", 1 + i,
                        " must have ", bytes, " bytes");
        bound.layers[i].bind(static_cast<const uint8_t*>(tensor.data()));
    }
    for (size_t i = 0; i < scales.size(); ++i) {
        const size_t at = 1 + bound.layers.size() + i;
        const ov::Tensor& tensor = inputs[at];
        OPENVINO_ASSERT(tensor && tensor.get_element_type() == ov::element::f32 &&
                            static_cast<int64_t>(tensor.get_size()) == scales[i],
                        "optimum_scap: input ", at, " must be f32 [", scales[i], "]");
        const bool is_hidden = i > 0 || !attributes().scales_input;
        (is_hidden ? bound.hidden_scale : bound.scale) = tensor.data<const float>();
    }
    return bound;
}

void SCAPLinear::validate_and_infer_types() {
    make_plan();
    check_inputs();
    set_output_size(attributes().out_features.size());
    for (size_t i = 0; i < attributes().out_features.size(); ++i) {
        set_output_type(i, ov::element::f32, output_shape(attributes().out_features[i]));
    }
}

std::shared_ptr<ov::Node> SCAPLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return clone_as<SCAPLinear>(inputs);
}

bool SCAPLinear::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const Bound bound = bind(inputs);
    const std::vector<Weights>& layers = bound.layers;
    OPENVINO_ASSERT(outputs.size() == layers.size(), "optimum_scap: wrong number of outputs");
    int64_t rows = 0;
    const ov::Shape shape = leading_shape(inputs[0], attributes().in_features, &rows);
    std::vector<float*> y(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        y[i] = set_output(outputs[i], shape, attributes().out_features[i]);
    }
    if (rows > 0) {
        const Threshold threshold =
            threshold_for(inputs[0].get_shape(), attributes().mode, attributes().threshold, bound.scale);
        sparse_linear(inputs[0].data<const float>(), rows, threshold, layers, attributes().arithmetic, y.data());
    }
    return true;
}

void SCAPFeedForward::check_attributes(const Attributes& attributes) const {
    const size_t count = attributes.out_features.size();
    NODE_VALIDATION_CHECK(this, count == 2 || count == 3, "needs up and down, or gate, up and down; got ", count,
                          " layers");
    NODE_VALIDATION_CHECK(this, count == 2 || attributes.out_features[0] == attributes.out_features[1],
                          "gate and up must have the same out_features");
    NODE_VALIDATION_CHECK(this, attributes.hidden_threshold >= 0.0f, "hidden_threshold must not be negative");
}

void SCAPFeedForward::validate_and_infer_types() {
    make_plan();
    check_inputs();
    set_output_type(0, ov::element::f32, output_shape(attributes().out_features.back()));
}

std::shared_ptr<ov::Node> SCAPFeedForward::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return clone_as<SCAPFeedForward>(inputs);
}

bool SCAPFeedForward::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const Bound bound = bind(inputs);
    OPENVINO_ASSERT(outputs.size() == 1, "optimum_scap: wrong number of outputs");
    int64_t rows = 0;
    const ov::Shape shape = leading_shape(inputs[0], attributes().in_features, &rows);
    float* y = set_output(outputs[0], shape, attributes().out_features.back());
    if (rows > 0) {
        const ov::Shape& x_shape = inputs[0].get_shape();
        sparse_ffn(inputs[0].data<const float>(), rows,
                   threshold_for(x_shape, attributes().mode, attributes().threshold, bound.scale),
                   threshold_for(x_shape, attributes().hidden_mode, attributes().hidden_threshold, bound.hidden_scale),
                   attributes().activation, bound.layers, attributes().arithmetic, y);
    }
    return true;
}

}  // namespace scap

// The macro takes one argument, and a braced list has commas.
using Extensions = std::vector<ov::Extension::Ptr>;
OPENVINO_CREATE_EXTENSIONS((Extensions{std::make_shared<ov::OpExtension<scap::SCAPLinear>>(),
                                       std::make_shared<ov::OpExtension<scap::SCAPFeedForward>>()}))
