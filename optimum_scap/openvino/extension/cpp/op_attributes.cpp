// SPDX-License-Identifier: Apache-2.0
// The operations' attributes: what OpenVINO sees of them, and their texts as values.
#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>

#include "op.hpp"

namespace scap {
namespace {

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

}  // namespace

void SparseOp::visit_texts(ov::AttributeVisitor& visitor, std::initializer_list<const char*> names) {
    // A visitor may write as well as read.
    if (texts_.use_count() > 1) {
        texts_ = std::make_shared<Texts>(*texts_);
    }
    is_stale_ = true;
    for (const char* name : names) {
        visitor.on_attribute(name, (*texts_)[name]);
    }
}

bool SparseOp::visit_attributes(ov::AttributeVisitor& visitor) {
    visit_texts(visitor, {"in_features", "out_features", "weight_types", "scale_types", "group_sizes", "zero_points",
                          "has_bias", "mode", "threshold", "decode_only", "scaled", "activation_group_size",
                          "precision"});
    return true;
}

const std::string& SparseOp::text(const char* name) const {
    const auto found = texts_->find(name);
    NODE_VALIDATION_CHECK(this, found != texts_->end() && !found->second.empty(), "attribute ", name,
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

void SparseOp::parse_scaled(Attributes& parsed) const {
    // IRs written before there were scales have no such attribute.
    const auto found = texts_->find("scaled");
    const std::string scaled = found == texts_->end() ? "" : found->second;
    const bool both = scaled == "input, hidden";
    parsed.scales_input = both || scaled == "input";
    parsed.scales_hidden = both || scaled == "hidden";
    const bool is_known = scaled.empty() || parsed.scales_input || parsed.scales_hidden;
    NODE_VALIDATION_CHECK(this, is_known && (has_hidden() || !parsed.scales_hidden), "scaled must be empty or ",
                          has_hidden() ? "one of 'input', 'hidden' and 'input, hidden'" : "'input'", "; got '", scaled,
                          "'");
}

int64_t SparseOp::parse_activation_group_size() const {
    // IRs written before activations could be single bytes have no such attribute.
    const auto found = texts_->find("activation_group_size");
    if (found == texts_->end() || found->second.empty()) {
        return 0;
    }
    const int64_t size = parse_integer("activation_group_size", found->second);
    NODE_VALIDATION_CHECK(this, size == 0 || size >= kSmallestActivationGroup,
                          "activation_group_size must be 0 or at least ", kSmallestActivationGroup, ", got ", size);
    return size;
}

SparseOp::Attributes SparseOp::parse_attributes() const {
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
    parsed.arithmetic.precision = named(kPrecisions, "precision", text("precision"));
    parsed.arithmetic.activation_group_size = parse_activation_group_size();
    parse_scaled(parsed);
    return parsed;
}

bool SCAPFeedForward::visit_attributes(ov::AttributeVisitor& visitor) {
    visit_texts(visitor, {"activation", "hidden_mode", "hidden_threshold"});
    return SparseOp::visit_attributes(visitor);
}

SparseOp::Attributes SCAPFeedForward::parse_attributes() const {
    Attributes parsed = SparseOp::parse_attributes();
    parsed.activation = named(kActivations, "activation", text("activation"));
    parsed.hidden_mode = number("hidden_mode");
    parsed.hidden_threshold = number("hidden_threshold");
    return parsed;
}

}  // namespace scap
