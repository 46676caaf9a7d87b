// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "linear.hpp"

namespace scap {

/// Attributes and inputs that both operations share: fully connected layers on one thresholded input.
///
/// Inputs: x [..., in_features] f32, then one u8 buffer per layer (see Weights), because OpenVINO converts constants
/// of the types that the weights really have. Then for every activation that the attribute `scaled` names ("", "input",
/// and of an FFN also "hidden" and "input, hidden") the scale of each of its channels in Threshold, f32 [channels].
///
/// All attributes are text for OpenVINO, lists with commas. Of typed ones its readers leave out what they cannot parse,
/// or a part of it ("maybe" as bool, "7x" as number), and what is missing: the default would be used without a word.
class SparseOp : public ov::op::Op {
public:
    OPENVINO_OP("SparseOp", "optimum_scap");
    SparseOp() = default;

    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override {
        return true;
    }

protected:
    struct Attributes {
        int64_t in_features = 0;
        std::vector<int64_t> out_features;
        std::vector<WeightType> weight_types;
        std::vector<ScaleType> scale_types;
        std::vector<int64_t> group_sizes;
        std::vector<int64_t> zero_points;
        std::vector<int64_t> has_bias;
        float mode = 0.0f;
        float threshold = 0.0f;
        bool decode_only = false;
        bool scales_input = false;
        bool scales_hidden = false;
        Precision precision = Precision::split;
        // SCAPFeedForward only
        Activation activation = Activation::silu;
        float hidden_mode = 0.0f;
        float hidden_threshold = 0.0f;
    };

    /// Reads the attributes anew from their texts.
    virtual void parse_attributes();
    /// Checks attributes and inputs; fills `layers_`.
    void validate_layers();
    ov::PartialShape output_shape(int64_t out_features) const;
    /// This call's pointers; null where nothing is scaled.
    struct Bound {
        std::vector<Weights> layers;
        const float* scale = nullptr;
        const float* hidden_scale = nullptr;
    };
    /// Throws where a tensor is not what validation saw.
    Bound bind(const ov::TensorVector& inputs) const;
    /// What prunes an input of shape [..., tokens, channels]: nothing (a threshold of 0) if only decode is pruned and
    /// there are several tokens.
    Threshold threshold_for(const ov::Shape& shape, float mode, float threshold, const float* scale) const;
    /// The sizes of the inputs behind the layers' buffers.
    std::vector<int64_t> scale_sizes() const;

    /// The value of an attribute. Throws, naming it, where it is missing or is no such value.
    const std::string& text(const char* name) const;
    std::vector<std::string> texts(const char* name) const;
    int64_t integer(const char* name) const;
    std::vector<int64_t> integers(const char* name) const;
    float number(const char* name) const;
    bool flag(const char* name) const;
    template <class Value>
    Value named(const std::map<std::string, Value>& values, const char* name, const std::string& found) const;
    int64_t parse_integer(const char* name, const std::string& found) const;
    void parse_scaled(Attributes& parsed) const;

    /// Input features of layer i.
    virtual int64_t layer_in_features(size_t i) const = 0;
    /// Whether there are activations inside the operation that are pruned too.
    virtual bool has_hidden() const {
        return false;
    }

    std::map<std::string, std::string> texts_;
    Attributes attributes_;
    std::vector<Weights> layers_;
};

/// y_i = W_i sparsify(x - mode) + b_i: one output per layer.
class SCAPLinear : public SparseOp {
public:
    OPENVINO_OP("SCAPLinear", "optimum_scap", SparseOp);
    SCAPLinear() = default;

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

protected:
    int64_t layer_in_features(size_t) const override {
        return attributes_.in_features;
    }
};

/// y = down(sparsify(activation(gate(sparsify(x))) * up(sparsify(x)))), or down(sparsify(activation(up(...)))).
class SCAPFeedForward : public SparseOp {
public:
    OPENVINO_OP("SCAPFeedForward", "optimum_scap", SparseOp);
    SCAPFeedForward() = default;

    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

protected:
    void parse_attributes() override;
    bool has_hidden() const override {
        return true;
    }
    int64_t layer_in_features(size_t i) const override {
        return i + 1 == attributes_.out_features.size() ? attributes_.out_features[0] : attributes_.in_features;
    }
};

}  // namespace scap
