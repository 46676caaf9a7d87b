// SPDX-License-Identifier: Apache-2.0
#include "op.hpp"

#include <cmath>
#include <map>
#include <openvino/core/op_extension.hpp>

namespace scap {
namespace {

// Sizes beyond this would overflow 32-bit channel indices; no layer comes near.
constexpr int64_t kMaxFeatures = int64_t(1) << 30;

const std::map<std::string, WeightType> kWeightTypes = {{"f32", WeightType::f32},
                                                        {"f16", WeightType::f16},
                                                        {"bf16", WeightType::bf16},
                                                        {"u8", WeightType::u8},
                                                        {"u4", WeightType::u4}};
const std::map<std::string, ScaleType> kScaleTypes = {{"f32", ScaleType::f32}, {"f16", ScaleType::f16}};
const std::map<std::string, Precision> kPrecisions = {
    {"f32", Precision::f32}, {"split", Precision::split}, {"bf16", Precision::bf16}};
const std::map<std::string, Activation> kActivations = {
    {"identity", Activation::identity}, {"silu", Activation::silu}, {"gelu_tanh", Activation::gelu_tanh},
    {"gelu_erf", Activation::gelu_erf}, {"relu", Activation::relu}, {"relu2", Activation::relu2}};

template <class Value>
Value parse(const std::map<std::string, Value>& names, const std::string& name, const char* attribute) {
    const auto found = names.find(name);
    OPENVINO_ASSERT(found != names.end(), "optimum_scap: unknown ", attribute, " '", name, "'");
    return found->second;
}

ov::Shape leading_shape(const ov::Tensor& x, int64_t in_features, int64_t* rows) {
    ov::Shape shape = x.get_shape();
    OPENVINO_ASSERT(x.get_element_type() == ov::element::f32 && !shape.empty() &&
                        static_cast<int64_t>(shape.back()) == in_features,
                    "optimum_scap: x must be f32 [..., ", in_features, "]");
    shape.pop_back();
    *rows = static_cast<int64_t>(ov::shape_size(shape));
    return shape;
}

float* set_output(ov::Tensor& output, ov::Shape shape, int64_t out_features) {
    shape.push_back(static_cast<size_t>(out_features));
    output.set_shape(shape);
    return output.data<float>();
}

}  // namespace

bool SparseOp::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in_features", attributes_.in_features);
    visitor.on_attribute("out_features", attributes_.out_features);
    visitor.on_attribute("weight_types", attributes_.weight_types);
    visitor.on_attribute("scale_types", attributes_.scale_types);
    visitor.on_attribute("group_sizes", attributes_.group_sizes);
    visitor.on_attribute("zero_points", attributes_.zero_points);
    visitor.on_attribute("has_bias", attributes_.has_bias);
    visitor.on_attribute("mode", attributes_.mode);
    visitor.on_attribute("threshold", attributes_.threshold);
    visitor.on_attribute("decode_only", attributes_.decode_only);
    visitor.on_attribute("precision", attributes_.precision);
    return true;
}

void SparseOp::check_threshold(float mode, float threshold, const char* name) const {
    NODE_VALIDATION_CHECK(this, std::isfinite(mode) && std::isfinite(threshold) && threshold >= 0.0f, name,
                          " and its mode must be finite, and the threshold not negative; got ", threshold, " and ",
                          mode);
}

Threshold SparseOp::threshold_for(const ov::Shape& shape, float mode, float threshold) const {
    const bool dense = attributes_.decode_only && shape.size() > 1 && shape[shape.size() - 2] != 1;
    return Threshold{mode, dense ? 0.0f : threshold};
}

void SparseOp::validate_layers() {
    const size_t count = attributes_.out_features.size();
    NODE_VALIDATION_CHECK(this, count > 0, "needs at least one layer in out_features");
    for (const size_t size :
         {attributes_.weight_types.size(), attributes_.scale_types.size(), attributes_.group_sizes.size(),
          attributes_.zero_points.size(), attributes_.has_bias.size()}) {
        NODE_VALIDATION_CHECK(this, size == count, "per-layer attributes must all have ", count, " entries");
    }
    NODE_VALIDATION_CHECK(this, attributes_.in_features > 0 && attributes_.in_features <= kMaxFeatures,
                          "in_features out of range");
    check_threshold(attributes_.mode, attributes_.threshold, "threshold");
    parsed_precision_ = parse(kPrecisions, attributes_.precision, "precision");

    NODE_VALIDATION_CHECK(this, get_input_size() == 1 + count, "needs x and one buffer per layer: ", 1 + count,
                          " inputs, got ", get_input_size());
    layers_.clear();
    for (size_t i = 0; i < count; ++i) {
        NODE_VALIDATION_CHECK(this, attributes_.out_features[i] > 0 && attributes_.out_features[i] <= kMaxFeatures,
                              "out_features out of range");
        NODE_VALIDATION_CHECK(this, attributes_.group_sizes[i] >= 0,
                              "group_sizes must not be negative; 0 is one group");
        NODE_VALIDATION_CHECK(this, attributes_.zero_points[i] >= -1 && attributes_.zero_points[i] <= 255,
                              "zero_points must lie in [0, 255], or be -1 where the buffer holds them");
        NODE_VALIDATION_CHECK(this, attributes_.has_bias[i] == 0 || attributes_.has_bias[i] == 1,
                              "has_bias must be 0 or 1");
        Weights weights;
        weights.type = parse(kWeightTypes, attributes_.weight_types[i], "weight type");
        weights.scale_type = parse(kScaleTypes, attributes_.scale_types[i], "scale type");
        weights.in_features = layer_in_features(i);
        weights.out_features = attributes_.out_features[i];
        weights.group_size = weights.in_features;
        if (is_quantized(weights.type)) {
            weights.has_zero_points = attributes_.zero_points[i] == -1;
            weights.zero_point = static_cast<int32_t>(std::max<int64_t>(attributes_.zero_points[i], 0));
            if (attributes_.group_sizes[i] != 0) {
                weights.group_size = std::min(attributes_.group_sizes[i], weights.in_features);
            }
        }
        weights.has_bias = attributes_.has_bias[i] == 1;
        const ov::PartialShape& shape = get_input_partial_shape(1 + i);
        NODE_VALIDATION_CHECK(this,
                              get_input_element_type(1 + i) == ov::element::u8 && shape.is_static() &&
                                  shape.size() == 1 && shape[0].get_length() == weights.buffer_bytes(),
                              "input ", 1 + i, " must be u8 [", weights.buffer_bytes(), "], got ",
                              get_input_element_type(1 + i), " ", shape);
        layers_.push_back(weights);
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
    NODE_VALIDATION_CHECK(this, last.compatible(attributes_.in_features),
                          "x must end in in_features = ", attributes_.in_features, ", got ", shape);
    last = out_features;
    return shape;
}

std::vector<Weights> SparseOp::bind(const ov::TensorVector& inputs) const {
    OPENVINO_ASSERT(!layers_.empty() && inputs.size() == 1 + layers_.size(), "optimum_scap: wrong number of inputs");
    std::vector<Weights> layers = layers_;
    for (size_t i = 0; i < layers.size(); ++i) {
        const ov::Tensor& tensor = inputs[1 + i];
        OPENVINO_ASSERT(tensor && static_cast<int64_t>(tensor.get_byte_size()) == layers[i].buffer_bytes(),
                        "optimum_scap: input ", 1 + i, " must have ", layers[i].buffer_bytes(), " bytes");
        layers[i].bind(static_cast<const uint8_t*>(tensor.data()));
    }
    return layers;
}

void SCAPLinear::validate_and_infer_types() {
    validate_layers();
    set_output_size(attributes_.out_features.size());
    for (size_t i = 0; i < attributes_.out_features.size(); ++i) {
        set_output_type(i, ov::element::f32, output_shape(attributes_.out_features[i]));
    }
}

std::shared_ptr<ov::Node> SCAPLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto clone = std::make_shared<SCAPLinear>();
    clone->attributes_ = attributes_;
    clone->set_arguments(inputs);
    clone->constructor_validate_and_infer_types();
    return clone;
}

bool SCAPLinear::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const std::vector<Weights> layers = bind(inputs);
    OPENVINO_ASSERT(outputs.size() == layers.size(), "optimum_scap: wrong number of outputs");
    int64_t rows = 0;
    const ov::Shape shape = leading_shape(inputs[0], attributes_.in_features, &rows);
    std::vector<float*> y(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        y[i] = set_output(outputs[i], shape, attributes_.out_features[i]);
    }
    if (rows > 0) {
        const Threshold threshold = threshold_for(inputs[0].get_shape(), attributes_.mode, attributes_.threshold);
        sparse_linear(inputs[0].data<const float>(), rows, threshold, layers, parsed_precision_, y.data());
    }
    return true;
}

bool SCAPFeedForward::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("activation", attributes_.activation);
    visitor.on_attribute("hidden_mode", attributes_.hidden_mode);
    visitor.on_attribute("hidden_threshold", attributes_.hidden_threshold);
    return SparseOp::visit_attributes(visitor);
}

void SCAPFeedForward::validate_and_infer_types() {
    const size_t count = attributes_.out_features.size();
    NODE_VALIDATION_CHECK(this, count == 2 || count == 3, "needs up and down, or gate, up and down; got ", count,
                          " layers");
    NODE_VALIDATION_CHECK(this, count == 2 || attributes_.out_features[0] == attributes_.out_features[1],
                          "gate and up must have the same out_features");
    check_threshold(attributes_.hidden_mode, attributes_.hidden_threshold, "hidden_threshold");
    parsed_activation_ = parse(kActivations, attributes_.activation, "activation");
    validate_layers();
    set_output_type(0, ov::element::f32, output_shape(attributes_.out_features.back()));
}

std::shared_ptr<ov::Node> SCAPFeedForward::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto clone = std::make_shared<SCAPFeedForward>();
    clone->attributes_ = attributes_;
    clone->set_arguments(inputs);
    clone->constructor_validate_and_infer_types();
    return clone;
}

bool SCAPFeedForward::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const std::vector<Weights> layers = bind(inputs);
    OPENVINO_ASSERT(outputs.size() == 1, "optimum_scap: wrong number of outputs");
    int64_t rows = 0;
    const ov::Shape shape = leading_shape(inputs[0], attributes_.in_features, &rows);
    float* y = set_output(outputs[0], shape, attributes_.out_features.back());
    if (rows > 0) {
        const ov::Shape& x_shape = inputs[0].get_shape();
        sparse_ffn(inputs[0].data<const float>(), rows,
                   threshold_for(x_shape, attributes_.mode, attributes_.threshold),
                   threshold_for(x_shape, attributes_.hidden_mode, attributes_.hidden_threshold), parsed_activation_,
                   layers, parsed_precision_, y);
    }
    return true;
}

}  // namespace scap

// The macro takes one argument, and a braced list has commas.
using Extensions = std::vector<ov::Extension::Ptr>;
OPENVINO_CREATE_EXTENSIONS((Extensions{std::make_shared<ov::OpExtension<scap::SCAPLinear>>(),
                                       std::make_shared<ov::OpExtension<scap::SCAPFeedForward>>()}))
