// SPDX-License-Identifier: Apache-2.0
// Drives the operations through OpenVINO's own classes, for the sanitizers: one node evaluated by several threads at
// once with changing numbers of rows, and attributes, inputs and tensors that do not fit together, each of which must
// throw ov::Exception. Exits with 1 if a result differs from that of one thread or something wrong is accepted.
#include "op.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <openvino/op/constant.hpp>
#include <openvino/op/parameter.hpp>
#include <random>
#include <sstream>
#include <thread>

using namespace scap;

namespace {

using Strings = std::vector<std::string>;
using Integers = std::vector<int64_t>;

/// The attributes of an operation by type, and those that are no such value.
struct Attributes {
    std::map<std::string, int64_t> integer;
    std::map<std::string, Integers> integers;
    std::map<std::string, Strings> strings;
    std::map<std::string, double> number;
    std::map<std::string, std::string> string;
};

template <class Value>
std::string text_of(const Value& value) {
    std::ostringstream text;
    text << value;
    return text.str();
}

template <class Value>
std::string text_of(const std::vector<Value>& values) {
    std::string text;
    for (const Value& value : values) {
        text += (text.empty() ? "" : ", ") + text_of(value);
    }
    return text;
}

/// Sets them as the reader of an IR does; `string` wins.
class Setter : public ov::AttributeVisitor {
public:
    explicit Setter(const Attributes& attributes) : texts_(attributes.string) {
        add(attributes.integer);
        add(attributes.integers);
        add(attributes.strings);
        add(attributes.number);
    }

    using ov::AttributeVisitor::on_adapter;
    void on_adapter(const std::string&, ov::ValueAccessor<void>&) override {
        std::printf("FAILED: an attribute is no text\n");
        std::exit(1);
    }
    void on_adapter(const std::string& name, ov::ValueAccessor<std::string>& adapter) override {
        const auto found = texts_.find(name);
        if (found != texts_.end()) {
            adapter.set(found->second);
        }
    }

private:
    template <class Value>
    void add(const std::map<std::string, Value>& values) {
        for (const auto& [name, value] : values) {
            texts_.emplace(name, text_of(value));
        }
    }

    std::map<std::string, std::string> texts_;
};

constexpr int64_t kIn = 70;
constexpr int64_t kHidden = 96;

/// gate, up (u4, groups of 32) and down (u8, zero points): as many of them as `layers`, and the scales of what `scaled`
/// names.
Attributes attributes_of(size_t layers, const std::string& scaled = "") {
    Attributes result;
    result.integer["in_features"] = kIn;
    result.integers = {{"out_features", {kHidden, kHidden, kIn}},
                       {"group_sizes", {32, 32, 0}},
                       {"zero_points", {8, 8, -1}},
                       {"has_bias", {1, 0, 1}}};
    result.strings = {{"weight_types", {"u4", "u4", "u8"}}, {"scale_types", {"f32", "f32", "f32"}}};
    result.number = {{"mode", 0.1}, {"threshold", 0.5}, {"hidden_mode", 0.01}, {"hidden_threshold", 0.2}};
    result.string = {
        {"decode_only", "false"}, {"precision", "split"}, {"activation", "silu"}, {"scaled", scaled}};
    for (auto& [name, values] : result.integers) {
        values.resize(layers);
    }
    for (auto& [name, values] : result.strings) {
        values.resize(layers);
    }
    return result;
}

ov::Tensor buffer_for(size_t layer) {
    Weights weights;
    weights.type = layer < 2 ? WeightType::u4 : WeightType::u8;
    weights.in_features = layer < 2 ? kIn : kHidden;
    weights.out_features = layer < 2 ? kHidden : kIn;
    weights.group_size = layer < 2 ? 32 : kHidden;
    weights.has_zero_points = layer == 2;
    weights.has_bias = layer != 1;
    ov::Tensor tensor(ov::element::u8, {static_cast<size_t>(weights.buffer_bytes())});
    auto* data = tensor.data<uint8_t>();
    std::mt19937 random(static_cast<uint32_t>(layer));
    for (int64_t i = 0; i < weights.buffer_bytes(); ++i) {
        data[i] = static_cast<uint8_t>(random());
    }
    for (const auto& [begin, end] : {std::pair{weights.scales_offset(), weights.zero_points_offset()},
                                     std::pair{weights.bias_offset(), weights.buffer_bytes()}}) {
        for (int64_t at = begin; at + 4 <= end; at += 4) {
            const float value = 0.01f + static_cast<float>(random() % 100) * 1e-3f;
            std::memcpy(data + at, &value, 4);
        }
    }
    return tensor;
}

/// As many scales as channels, 0 among them.
ov::Tensor scales_for(int64_t channels) {
    ov::Tensor tensor(ov::element::f32, {static_cast<size_t>(channels)});
    for (int64_t i = 0; i < channels; ++i) {
        tensor.data<float>()[i] = static_cast<float>(i % 5) * 0.5f;
    }
    return tensor;
}

/// What an operation of `layers` layers reads behind x.
ov::TensorVector constants_for(size_t layers, const std::string& scaled) {
    ov::TensorVector constants;
    for (size_t i = 0; i < layers; ++i) {
        constants.push_back(buffer_for(i));
    }
    if (scaled.find("input") != std::string::npos) {
        constants.push_back(scales_for(kIn));
    }
    if (scaled.find("hidden") != std::string::npos) {
        constants.push_back(scales_for(kHidden));
    }
    return constants;
}

ov::OutputVector inputs_for(size_t layers, const std::string& scaled = "") {
    ov::OutputVector inputs{
        std::make_shared<ov::op::v0::Parameter>(ov::element::f32, ov::PartialShape{-1, -1, kIn})->output(0)};
    for (const ov::Tensor& constant : constants_for(layers, scaled)) {
        inputs.push_back(std::make_shared<ov::op::v0::Constant>(constant)->output(0));
    }
    return inputs;
}

template <class Op>
std::shared_ptr<ov::Node> make(const Attributes& attributes, const ov::OutputVector& inputs) {
    Op empty;
    Setter setter(attributes);
    static_cast<ov::Node&>(empty).visit_attributes(setter);
    return empty.clone_with_new_inputs(inputs);
}

ov::Tensor activations(ov::Shape shape) {
    ov::Tensor x(ov::element::f32, shape);
    std::mt19937 random(static_cast<uint32_t>(x.get_size()));
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < x.get_size(); ++i) {
        x.data<float>()[i] = normal(random);
    }
    return x;
}

ov::TensorVector evaluate(const ov::Node& node, ov::TensorVector inputs) {
    ov::TensorVector outputs;
    for (size_t i = 0; i < node.get_output_size(); ++i) {
        outputs.emplace_back(ov::element::f32, ov::Shape{0});
    }
    node.evaluate(outputs, inputs);
    return outputs;
}

int failures = 0;

void check(bool right, const char* what) {
    if (!right) {
        std::printf("FAILED: %s\n", what);
        ++failures;
    }
}

void check_throws(const char* what, const std::function<void()>& body) {
    try {
        body();
    } catch (const ov::Exception&) {
        return;
    }
    check(false, what);
}

/// Every thread evaluates the same node and the same weights.
void check_threads(const ov::Node& node, const ov::TensorVector& buffers) {
    const std::vector<ov::Shape> shapes = {{1, 1, kIn}, {1, 17, kIn}, {2, 3, kIn}, {0, 3, kIn}, {1, 300, kIn}, {kIn}};
    const auto run = [&](const ov::Shape& shape) {
        ov::TensorVector inputs{activations(shape)};
        inputs.insert(inputs.end(), buffers.begin(), buffers.end());
        return evaluate(node, inputs);
    };
    std::vector<ov::TensorVector> expected;
    for (const ov::Shape& shape : shapes) {
        expected.push_back(run(shape));
    }
    std::vector<int> wrong(4, 0);
    std::vector<std::thread> threads;
    for (size_t t = 0; t < wrong.size(); ++t) {
        threads.emplace_back([&, t] {
            for (size_t i = 0; i < 2 * shapes.size(); ++i) {
                const size_t at = (i + t) % shapes.size();
                const ov::TensorVector outputs = run(shapes[at]);
                for (size_t o = 0; o < outputs.size(); ++o) {
                    wrong[t] += outputs[o].get_shape() != expected[at][o].get_shape() ||
                                std::memcmp(outputs[o].data(), expected[at][o].data(), outputs[o].get_byte_size()) != 0;
                }
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    for (const int count : wrong) {
        check(count == 0, "threads give what one thread gives");
    }
    check(std::isfinite(expected[0][0].data<float>()[0]), "results are finite");
}

template <class Op>
void check_attributes(size_t layers) {
    const Attributes good = attributes_of(layers);
    const ov::OutputVector inputs = inputs_for(layers);
    make<Op>(good, inputs);
    const auto refused = [&](const char* what, const std::function<void(Attributes&)>& spoil) {
        Attributes bad = good;
        spoil(bad);
        check_throws(what, [&] {
            make<Op>(bad, inputs);
        });
    };
    constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
    constexpr int64_t kTiny = std::numeric_limits<int64_t>::min();
    for (const int64_t size : {int64_t(0), int64_t(-1), kIn + 40, int64_t(1) << 30, int64_t(1) << 31, kHuge, kTiny}) {
        refused("in_features", [&](Attributes& a) {
            a.integer["in_features"] = size;
        });
        for (size_t i = 0; i < layers; ++i) {
            refused("out_features", [&](Attributes& a) {
                a.integers["out_features"][i] = size;
            });
        }
        refused("all sizes", [&](Attributes& a) {
            a.integer["in_features"] = size;
            a.integers["out_features"].assign(layers, size);
            a.integers["group_sizes"].assign(layers, 1);
        });
    }
    for (const int64_t value : {int64_t(-1), int64_t(1), kTiny}) {
        refused("group_sizes", [&](Attributes& a) {
            a.integers["group_sizes"][0] = value;
        });
    }
    for (const int64_t value : {int64_t(-1), int64_t(-2), int64_t(16), int64_t(256), kHuge, kTiny}) {
        refused("zero_points", [&](Attributes& a) {
            a.integers["zero_points"][0] = value;
        });
    }
    for (const int64_t value : {int64_t(0), int64_t(2), int64_t(-1), kHuge}) {
        refused("has_bias", [&](Attributes& a) {
            a.integers["has_bias"][0] = value;
        });
    }
    for (const char* name : {"out_features", "group_sizes", "zero_points", "has_bias"}) {
        for (const size_t count : {size_t(0), layers - 1, layers + 1}) {
            refused(name, [&](Attributes& a) {
                a.integers[name].resize(count, 1);
            });
        }
    }
    for (const char* name : {"weight_types", "scale_types"}) {
        for (const size_t count : {size_t(0), layers - 1, layers + 1}) {
            refused(name, [&](Attributes& a) {
                a.strings[name].resize(count, "f32");
            });
        }
        for (const char* value : {"", "f64", "f16"}) {
            refused(name, [&](Attributes& a) {
                a.strings[name][0] = value;
            });
        }
    }
    for (const double value : {-1.0, double(NAN), double(INFINITY), 1e300}) {
        refused("threshold", [&](Attributes& a) {
            a.number["threshold"] = value;
        });
    }
    for (const double value : {double(NAN), -double(INFINITY)}) {
        refused("mode", [&](Attributes& a) {
            a.number["mode"] = value;
        });
    }
    const std::map<std::string, Strings> texts = {
        {"in_features", {"", "70x", "seventy", "7e1", "70.0", "+70", "99999999999999999999"}},
        {"out_features", {",", "96, 96,", "96,, 96", "96; 96", "nan"}},
        {"weight_types", {",", "u4, ", "U4, u4"}},
        {"group_sizes", {"32, 32x", "32, 1e1"}},
        {"mode", {"", "0.1.2", "0,1", "1e39", "-1e39", "nan", "inf", "mean"}},
        {"threshold", {"", "0.5x", "1e39", "1e9999", "nan", "-inf"}},
        {"decode_only", {"", "maybe", "True", "2", "yes"}},
        {"precision", {"", "F32", "int3", "f32 "}},
        {"activation_group_size", {"-1", "1", "15", "64x", "no"}},
        {"scaled", {"input", "hidden", "input, hidden", "inputs", "none", " "}},  // there is no such input
    };
    for (const auto& [name, values] : texts) {
        for (const std::string& value : values) {
            refused(name.c_str(), [&](Attributes& a) {
                a.string[name] = value;
            });
        }
    }
    check_throws("nothing set", [&] {
        make<Op>(Attributes{}, inputs);
    });

    const auto refused_input = [&](const char* what, size_t index, const ov::Output<ov::Node>& input) {
        ov::OutputVector bad = inputs;
        bad[index] = input;
        check_throws(what, [&] {
            make<Op>(good, bad);
        });
    };
    const auto parameter = [](ov::element::Type type, const ov::PartialShape& shape) {
        return std::make_shared<ov::op::v0::Parameter>(type, shape)->output(0);
    };
    refused_input("x of f16", 0, parameter(ov::element::f16, {-1, kIn}));
    refused_input("x of i64", 0, parameter(ov::element::i64, {-1, kIn}));
    refused_input("a scalar", 0, parameter(ov::element::f32, ov::PartialShape{}));
    refused_input("x of another width", 0, parameter(ov::element::f32, {-1, kIn + 1}));
    refused_input("x without channels", 0, parameter(ov::element::f32, {-1, 0}));
    const ov::PartialShape bytes = inputs[1].get_partial_shape();
    refused_input("a buffer of i8", 1, parameter(ov::element::i8, bytes));
    refused_input("an empty buffer", 1, parameter(ov::element::u8, {0}));
    refused_input("a buffer of any size", 1, parameter(ov::element::u8, {-1}));
    refused_input("a buffer of any rank", 1, parameter(ov::element::u8, ov::PartialShape::dynamic()));
    refused_input("a buffer of two dimensions", 1, parameter(ov::element::u8, {1, bytes[0]}));
    refused_input("a short buffer", 1, parameter(ov::element::u8, {bytes[0].get_length() - 1}));
    refused_input("a long buffer", 1, parameter(ov::element::u8, {bytes[0].get_length() + 1}));
    for (const size_t count : {size_t(0), size_t(1), layers}) {
        check_throws("too few inputs", [&] {
            make<Op>(good, ov::OutputVector(inputs.begin(), inputs.begin() + static_cast<int64_t>(count)));
        });
    }
    check_throws("too many inputs", [&] {
        ov::OutputVector more = inputs;
        more.push_back(inputs[1]);
        make<Op>(good, more);
    });
}

/// The first scale of an operation that has one, at input `at`.
template <class Op>
void check_scales(size_t layers, const std::string& scaled, size_t at) {
    const ov::OutputVector inputs = inputs_for(layers, scaled);
    make<Op>(attributes_of(layers, scaled), inputs);
    const int64_t channels = inputs[at].get_partial_shape()[0].get_length();
    const auto refused = [&](const char* what, ov::element::Type type, const ov::PartialShape& shape) {
        ov::OutputVector bad = inputs;
        bad[at] = std::make_shared<ov::op::v0::Parameter>(type, shape)->output(0);
        check_throws(what, [&] {
            make<Op>(attributes_of(layers, scaled), bad);
        });
    };
    refused("a scale of f16", ov::element::f16, {channels});
    refused("a scale of bytes", ov::element::u8, {4 * channels});
    refused("a short scale", ov::element::f32, {channels - 1});
    refused("a long scale", ov::element::f32, {channels + 1});
    refused("a scale of any size", ov::element::f32, {-1});
    refused("a scale of any rank", ov::element::f32, ov::PartialShape::dynamic());
    refused("one scale for all", ov::element::f32, ov::PartialShape{});
    refused("a scale of two dimensions", ov::element::f32, {1, channels});
    check_throws("no scale", [&] {
        make<Op>(attributes_of(layers, scaled), ov::OutputVector(inputs.begin(), inputs.end() - 1));
    });
    check_throws("a scale that no attribute names", [&] {
        make<Op>(attributes_of(layers), inputs);
    });
}

void check_tensors(const ov::Node& node, const ov::TensorVector& buffers) {
    ov::TensorVector good{activations({2, kIn})};
    good.insert(good.end(), buffers.begin(), buffers.end());
    evaluate(node, good);
    const auto refused = [&](const char* what, size_t index, const ov::Tensor& tensor) {
        ov::TensorVector bad = good;
        bad[index] = tensor;
        check_throws(what, [&] {
            evaluate(node, bad);
        });
    };
    for (size_t i = 0; i < good.size(); ++i) {
        refused("a null tensor", i, ov::Tensor());
        refused("an empty tensor", i, ov::Tensor(good[i].get_element_type(), {0}));
    }
    refused("x of f16", 0, ov::Tensor(ov::element::f16, {2, kIn}));
    refused("x of another width", 0, ov::Tensor(ov::element::f32, {2, kIn - 1}));
    refused("a scalar", 0, ov::Tensor(ov::element::f32, {}));
    refused("a short buffer", 1, ov::Tensor(ov::element::u8, {buffers[0].get_size() - 1}));
    check_throws("no inputs", [&] {
        evaluate(node, {});
    });
    check_throws("one input", [&] {
        evaluate(node, {good[0]});
    });
    const auto refused_outputs = [&](const char* what, ov::TensorVector outputs) {
        check_throws(what, [&] {
            node.evaluate(outputs, good);
        });
    };
    refused_outputs("no outputs", {});
    refused_outputs("null outputs", ov::TensorVector(node.get_output_size()));
    refused_outputs("outputs of f16",
                    ov::TensorVector(node.get_output_size(), ov::Tensor(ov::element::f16, ov::Shape{0})));
    refused_outputs("too many outputs",
                    ov::TensorVector(node.get_output_size() + 1, ov::Tensor(ov::element::f32, ov::Shape{0})));
    // A node that validation never saw.
    check_throws("no attributes", [&] {
        evaluate(SCAPLinear(), good);
    });
    check_throws("no attributes", [&] {
        evaluate(SCAPFeedForward(), good);
    });
}

}  // namespace

int main() {
    const ov::TensorVector buffers{buffer_for(0), buffer_for(1), buffer_for(2)};
    const ov::TensorVector projections{buffers[0], buffers[1]};
    const auto linear = make<SCAPLinear>(attributes_of(2), inputs_for(2));
    const auto ffn = make<SCAPFeedForward>(attributes_of(3), inputs_for(3));
    check_threads(*linear, projections);
    check_threads(*ffn, buffers);
    check_attributes<SCAPLinear>(2);
    check_attributes<SCAPFeedForward>(3);
    check_tensors(*linear, projections);
    check_tensors(*ffn, buffers);

    const auto scaled_linear = make<SCAPLinear>(attributes_of(2, "input"), inputs_for(2, "input"));
    check_threads(*scaled_linear, constants_for(2, "input"));
    check_tensors(*scaled_linear, constants_for(2, "input"));
    check_scales<SCAPLinear>(2, "input", 3);
    for (const char* scaled : {"input", "hidden", "input, hidden"}) {
        const auto scaled_ffn = make<SCAPFeedForward>(attributes_of(3, scaled), inputs_for(3, scaled));
        check_threads(*scaled_ffn, constants_for(3, scaled));
        check_tensors(*scaled_ffn, constants_for(3, scaled));
        check_scales<SCAPFeedForward>(3, scaled, 4);
    }
    check_throws("a linear layer's hidden activations", [&] {
        make<SCAPLinear>(attributes_of(2, "hidden"), inputs_for(2, "hidden"));
    });

    const ov::OutputVector inputs = inputs_for(3);
    for (const size_t count : {1, 4}) {
        check_throws("an FFN of one or four layers", [&] {
            Attributes bad = attributes_of(3);
            for (auto& [name, values] : bad.integers) {
                values.resize(count, 1);
            }
            for (auto& [name, values] : bad.strings) {
                values.resize(count, "f32");
            }
            make<SCAPFeedForward>(bad, inputs);
        });
    }
    for (const char* activation : {"", "mish"}) {
        check_throws("activation", [&] {
            Attributes bad = attributes_of(3);
            bad.string["activation"] = activation;
            make<SCAPFeedForward>(bad, inputs);
        });
    }
    return failures == 0 ? 0 : 1;
}
