// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>
#include <map>
#include <memory>
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
        Arithmetic arithmetic;
        // SCAPFeedForward only
        Activation activation = Activation::silu;
        float hidden_mode = 0.0f;
        float hidden_threshold = 0.0f;
    };

    /// What the attributes mean. OpenVINO clones an operation for every inference whose shapes may have changed, to
    /// infer them; the clones share what was read once.
    struct Plan {
        Attributes attributes;
        std::vector<Weights> layers;       // without their data
        std::vector<int64_t> scale_sizes;  // of the inputs behind the layers' buffers
    };

    /// Reads and checks the attributes, unless that was done since they changed.
    void make_plan();
    /// Checks that the inputs are what the attributes say.
    void check_inputs() const;
    const Attributes& attributes() const {
        return plan_->attributes;
    }
    virtual Attributes parse_attributes() const;
    /// Checks that go beyond those of the layers.
    virtual void check_attributes(const Attributes&) const {}
    void visit_texts(ov::AttributeVisitor& visitor, std::initializer_list<const char*> names);
    /// Another operation of this kind with the attributes of this one.
    template <class Op>
    std::shared_ptr<Op> clone_as(const ov::OutputVector& inputs) const {
        auto clone = std::make_shared<Op>();
        clone->texts_ = texts_;
        clone->plan_ = plan_;
        clone->is_stale_ = is_stale_;
        clone->set_arguments(inputs);
        clone->constructor_validate_and_infer_types();
        return clone;
    }
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
    int64_t parse_activation_group_size() const;

    /// Input features of layer i.
    virtual int64_t layer_in_features(const Attributes& attributes, size_t i) const = 0;
    /// Whether there are activations inside the operation that are pruned too.
    virtual bool has_hidden() const {
        return false;
    }

    using Texts = std::map<std::string, std::string>;
    std::shared_ptr<Texts> texts_ = std::make_shared<Texts>();
    std::shared_ptr<const Plan> plan_;
    bool is_stale_ = true;  // whether texts_ may have changed since plan_ was made

private:
    std::vector<Weights> plan_layers(const Attributes& attributes) const;
    std::vector<int64_t> plan_scales(const Attributes& attributes) const;
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
    int64_t layer_in_features(const Attributes& attributes, size_t) const override {
        return attributes.in_features;
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
    Attributes parse_attributes() const override;
    void check_attributes(const Attributes& attributes) const override;
    bool has_hidden() const override {
        return true;
    }
    int64_t layer_in_features(const Attributes& attributes, size_t i) const override {
        return i + 1 == attributes.out_features.size() ? attributes.out_features[0] : attributes.in_features;
    }
};

}  // namespace scap
