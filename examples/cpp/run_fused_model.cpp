// SPDX-License-Identifier: Apache-2.0
// Greedy decoding with a fused language model (optimum-cli scap fuse DIR FUSED) and OpenVINO alone.
//
//     run_fused_model FUSED/openvino_model.xml LIBRARY COUNT ID [ID...]
//
// LIBRARY is what `optimum-cli scap build-extension` prints. Reads the prompt as token ids and prints the ids of COUNT
// tokens that follow it. To build it against OpenVINO's Python package:
//
//     g++ -O2 -std=c++17 run_fused_model.cpp -o run_fused_model $(python -c "
//     from optimum_scap.openvino.extension.build import openvino_flags; print(*openvino_flags())")
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

namespace {

/// Feeds `ids`, which stand behind `past` tokens, and returns the likeliest next one.
int64_t step(ov::InferRequest& request, const std::vector<int64_t>& ids, size_t past) {
    const size_t count = ids.size();
    const ov::CompiledModel model = request.get_compiled_model();
    for (const auto& input : model.inputs()) {
        const std::string name = input.get_any_name();
        const bool whole = name == "attention_mask";  // over what was read before, too
        const ov::Shape shape = name == "beam_idx" ? ov::Shape{1} : ov::Shape{1, whole ? past + count : count};
        ov::Tensor tensor(input.get_element_type(), shape);
        if (name == "input_ids") {
            std::copy(ids.begin(), ids.end(), tensor.data<int64_t>());
        } else if (whole) {
            std::fill_n(tensor.data<int64_t>(), past + count, 1);
        } else if (name == "position_ids") {
            for (size_t i = 0; i < count; ++i) {
                tensor.data<int64_t>()[i] = static_cast<int64_t>(past + i);
            }
        } else if (name == "beam_idx") {
            std::memset(tensor.data(), 0, tensor.get_byte_size());
        } else {
            throw std::runtime_error("the model has an input " + name + ", which a language model should not have");
        }
        request.set_tensor(input, tensor);
    }
    request.infer();
    const ov::Tensor logits = request.get_tensor("logits");  // [1, tokens, vocabulary]
    const size_t vocabulary = logits.get_shape().back();
    const float* last = logits.data<const float>() + (logits.get_size() - vocabulary);
    return std::max_element(last, last + vocabulary) - last;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 5) {
        std::cerr << "usage: run_fused_model MODEL.xml LIBRARY COUNT ID [ID...]\n";
        return 2;
    }
    try {
        ov::Core core;
        core.add_extension(argv[2]);  // before the model is read: it holds operations of the library
        ov::CompiledModel model = core.compile_model(core.read_model(argv[1]), "CPU");
        ov::InferRequest request = model.create_infer_request();
        std::vector<int64_t> ids;
        for (int i = 4; i < argc; ++i) {
            ids.push_back(std::stoll(argv[i]));
        }
        size_t past = 0;
        for (int64_t left = std::stoll(argv[3]); left > 0; --left) {
            const int64_t next = step(request, ids, past);
            past += ids.size();
            ids = {next};
            std::cout << next << (left > 1 ? " " : "\n") << std::flush;
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
