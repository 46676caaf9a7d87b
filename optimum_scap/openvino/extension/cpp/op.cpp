// SPDX-License-Identifier: Apache-2.0
#include "op.hpp"

#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <openvino/core/op_extension.hpp>
#include <sstream>

namespace scap {
namespace {

// The bytes of a layer of this many inputs and outputs can be counted in 64 bits; no layer comes near.
constexpr int64_t kMaxFeatures = int64_t(1) << 28;

constexpr const char* kAttributes[] = {"in_features", "out_features", "weight_types", "scale_types",
                                       "group_sizes", "zero_points",  "has_bias",     "mode",
                                       "threshold",   "decode_only",  "precision"};

template <class Format, size_t N>
auto types_by_name(const Format (&formats)[N]) {
    std::map<std::string, decltype(Format::type)> types;
    for (const Format& format : formats) {
        types.emplace(format.name, format.type);
    }
    return types;
}

const std::map<std::string, WeightType> kWeightTypes = types_by_name(kWeightFormats);
const std::map<std::string, ScaleType> kScaleTypes = types_by_name(kScaleFormats);
const std::map<std::string, Precision> kPrecisions = {
    {"f32", Precision::f32}, {"split", Precision::split}, {"bf16", Precision::bf16}};
const std::map<std::string, Activation> kActivations = {
    {"identity", Activation::identity}, {"silu", Activation::silu}, {"gelu_tanh", Activation::gelu_tanh},
    {"gelu_erf", Activation::gelu_erf}, {"relu", Activation::relu}, {"relu2", Activation::relu2}};

std::string trimmed(const std::string& text) {
    const size_t begin = text.find_first_not_of(' ');
    return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(' ') + 1 - begin);
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
    for (const char* name : kAttributes) {
        visitor.on_attribute(name, texts_[name]);
    }
    return true;
}

const std::string& SparseOp::text(const char* name) const {
    const auto found = texts_.find(name);
    NODE_VALIDATION_CHECK(this, found != texts_.end() && !found->second.empty(), "attribute ", name,
                          " is missing or empty");
    return found->second;
}

std::vector<std::string> SparseOp::texts(const char* name) const {
    std::vector<std::string> items;
    // The end makes a last empty item count.
    std::istringstream stream(text(name) + ",");
    for (std::string item; std::getline(stream, item, ',');) {
        items.push_back(trimmed(item));
    }
    return items;
}

int64_t SparseOp::parse_integer(const char* name, const std::string& found) const {
    int64_t value = 0;
    const char* end = found.data() + found.size();
    const auto [stop, error] = std::from_chars(found.data(), end, value);
    NODE_VALIDATION_CHECK(this, error == std::errc() && stop == end, name, " must be an integer, got '", found, "'");
    return value;
}

int64_t SparseOp::integer(const char* name) const {
    return parse_integer(name, text(name));
}

std::vector<int64_t> SparseOp::integers(const char* name) const {
    std::vector<int64_t> values;
    for (const std::string& item : texts(name)) {
        values.push_back(parse_integer(name, item));
    }
    return values;
}

float SparseOp::number(const char* name) const {
    std::istringstream stream(text(name));
    stream.imbue(std::locale::classic());  // whatever the program's own is
    double value = 0.0;
    stream >> value;
    const bool is_whole = !stream.fail() && stream.peek() == std::istringstream::traits_type::eof();
    NODE_VALIDATION_CHECK(this, is_whole && std::abs(value) <= std::numeric_limits<float>::max(), name,
                          " must be a finite float32 number, got '", text(name), "'");
    return static_cast<float>(value);
}

bool SparseOp::flag(const char* name) const {
    return named<bool>({{"false", false}, {"true", true}}, name, text(name));
}

template <class Value>
Value SparseOp::named(const std::map<std::string, Value>& values, const char* name, const std::string& found) const {
    const auto value = values.find(found);
    std::string choices;
    for (const auto& [choice, _] : values) {
        choices += (choices.empty() ? "" : ", ") + choice;
    }
    NODE_VALIDATION_CHECK(this, value != values.end(), name, " must be one of ", choices, "; got '", found, "'");
    return value->second;
}

void SparseOp::parse_attributes() {
    Attributes parsed;
    parsed.in_features = integer("in_features");
    parsed.out_features = integers("out_features");
    for (const std::string& name : texts("weight_types")) {
        parsed.weight_types.push_back(named(kWeightTypes, "weight_types", name));
    }
    for (const std::string& name : texts("scale_types")) {
        parsed.scale_types.push_back(named(kScaleTypes, "scale_types", name));
    }
    parsed.group_sizes = integers("group_sizes");
    parsed.zero_points = integers("zero_points");
    parsed.has_bias = integers("has_bias");
    parsed.mode = number("mode");
    parsed.threshold = number("threshold");
    parsed.decode_only = flag("decode_only");
    parsed.precision = named(kPrecisions, "precision", text("precision"));
    attributes_ = parsed;
}

Threshold SparseOp::threshold_for(const ov::Shape& shape, float mode, float threshold) const {
    const bool dense = attributes_.decode_only && shape.size() > 1 && shape[shape.size() - 2] != 1;
    return Threshold{mode, dense ? 0.0f : threshold};
}

void SparseOp::validate_layers() {
    const size_t count = attributes_.out_features.size();
    for (const size_t size :
         {attributes_.weight_types.size(), attributes_.scale_types.size(), attributes_.group_sizes.size(),
          attributes_.zero_points.size(), attributes_.has_bias.size()}) {
        NODE_VALIDATION_CHECK(this, size == count, "per-layer attributes must all have ", count, " entries");
    }
    NODE_VALIDATION_CHECK(this, attributes_.in_features > 0 && attributes_.in_features <= kMaxFeatures,
                          "in_features out of range");
    NODE_VALIDATION_CHECK(this, attributes_.threshold >= 0.0f, "threshold must not be negative");

    NODE_VALIDATION_CHECK(this, get_input_size() == 1 + count, "needs x and one buffer per layer: ", 1 + count,
                          " inputs, got ", get_input_size());
    layers_.clear();
    for (size_t i = 0; i < count; ++i) {
        NODE_VALIDATION_CHECK(this, attributes_.out_features[i] > 0 && attributes_.out_features[i] <= kMaxFeatures,
                              "out_features out of range");
        NODE_VALIDATION_CHECK(this, attributes_.group_sizes[i] >= 0,
                              "group_sizes must not be negative; 0 is one group");
        NODE_VALIDATION_CHECK(this, attributes_.has_bias[i] == 0 || attributes_.has_bias[i] == 1,
                              "has_bias must be 0 or 1");
        Weights weights;
        weights.type = attributes_.weight_types[i];
        weights.scale_type = attributes_.scale_types[i];
        weights.in_features = layer_in_features(i);
        weights.out_features = attributes_.out_features[i];
        weights.group_size = weights.in_features;
        const int64_t zero_point = attributes_.zero_points[i];
        if (is_quantized(weights.type)) {
            const int64_t largest = (int64_t(1) << bits(weights.type)) - 1;
            NODE_VALIDATION_CHECK(this, zero_point >= -1 && zero_point <= largest, "zero_points must lie in [0, ",
                                  largest, "], or be -1 where the buffer holds them; got ", zero_point);
            weights.has_zero_points = zero_point == -1;
            weights.zero_point = static_cast<int32_t>(std::max<int64_t>(zero_point, 0));
            if (attributes_.group_sizes[i] != 0) {
                weights.group_size = std::min(attributes_.group_sizes[i], weights.in_features);
            }
        } else {
            NODE_VALIDATION_CHECK(this, zero_point == 0 && attributes_.group_sizes[i] == 0,
                                  "float weights have no zero_points and no group_sizes: both must be 0");
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
    parse_attributes();
    validate_layers();
    set_output_size(attributes_.out_features.size());
    for (size_t i = 0; i < attributes_.out_features.size(); ++i) {
        set_output_type(i, ov::element::f32, output_shape(attributes_.out_features[i]));
    }
}

std::shared_ptr<ov::Node> SCAPLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto clone = std::make_shared<SCAPLinear>();
    clone->texts_ = texts_;
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
        sparse_linear(inputs[0].data<const float>(), rows, threshold, layers, attributes_.precision, y.data());
    }
    return true;
}

bool SCAPFeedForward::visit_attributes(ov::AttributeVisitor& visitor) {
    for (const char* name : {"activation", "hidden_mode", "hidden_threshold"}) {
        visitor.on_attribute(name, texts_[name]);
    }
    return SparseOp::visit_attributes(visitor);
}

void SCAPFeedForward::parse_attributes() {
    SparseOp::parse_attributes();
    attributes_.activation = named(kActivations, "activation", text("activation"));
    attributes_.hidden_mode = number("hidden_mode");
    attributes_.hidden_threshold = number("hidden_threshold");
}

void SCAPFeedForward::validate_and_infer_types() {
    parse_attributes();
    const size_t count = attributes_.out_features.size();
    NODE_VALIDATION_CHECK(this, count == 2 || count == 3, "needs up and down, or gate, up and down; got ", count,
                          " layers");
    NODE_VALIDATION_CHECK(this, count == 2 || attributes_.out_features[0] == attributes_.out_features[1],
                          "gate and up must have the same out_features");
    NODE_VALIDATION_CHECK(this, attributes_.hidden_threshold >= 0.0f, "hidden_threshold must not be negative");
    validate_layers();
    set_output_type(0, ov::element::f32, output_shape(attributes_.out_features.back()));
}

std::shared_ptr<ov::Node> SCAPFeedForward::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto clone = std::make_shared<SCAPFeedForward>();
    clone->texts_ = texts_;
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
                   threshold_for(x_shape, attributes_.hidden_mode, attributes_.hidden_threshold), attributes_.activation,
                   layers, attributes_.precision, y);
    }
    return true;
}

}  // namespace scap

// The macro takes one argument, and a braced list has commas.
using Extensions = std::vector<ov::Extension::Ptr>;
OPENVINO_CREATE_EXTENSIONS((Extensions{std::make_shared<ov::OpExtension<scap::SCAPLinear>>(),
                                       std::make_shared<ov::OpExtension<scap::SCAPFeedForward>>()}))
