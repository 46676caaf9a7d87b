// SPDX-License-Identifier: Apache-2.0
// Runs every kernel without OpenVINO, for the sanitizers: all weight types, odd shapes, one and many rows, several
// callers at once. Buffers have exactly the promised size. Exits with 1 if a result is wrong.
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>

#include "linear.hpp"

using namespace scap;

#if defined(REFUSE_TILES)
// Linked with --wrap=syscall: the kernels ask for one thing only, and do not get it.
extern "C" long __wrap_syscall(long, ...) {
    return -1;
}
#endif

namespace {

struct Layer {
    Weights weights;
    std::vector<uint8_t> buffer;
    std::vector<double> dense;  // [in][out]
};

double value_at(const Weights& w, int64_t i, int64_t o) {
    const uint8_t* row = w.row(i);
    uint16_t half = 0;
    double q = 0.0;
    switch (w.type) {
        case WeightType::f32: {
            float value;
            std::memcpy(&value, row + 4 * o, 4);
            return value;
        }
        case WeightType::f16:
            std::memcpy(&half, row + 2 * o, 2);
            return f16_to_f32(half);
        case WeightType::bf16:
            std::memcpy(&half, row + 2 * o, 2);
            return bits_float(uint32_t(half) << 16);
        case WeightType::u8:
            q = row[o];
            break;
        case WeightType::u4:
            q = o % 32 < 16 ? row[o / 32 * 16 + o % 16] & 15 : row[o / 32 * 16 + o % 16] >> 4;
            break;
    }
    const int64_t group = i / w.group_size;
    const double zero = w.has_zero_points ? w.zero_points[group * w.padded_out() + o] : w.zero_point;
    std::memcpy(&half, w.scale_at(group, o), 2);
    return (q - zero) * f16_to_f32(half);
}

Layer make_layer(WeightType type, int64_t in, int64_t out, int64_t group_size, bool zero_points,
                 std::mt19937& random) {
    Layer layer;
    Weights& w = layer.weights;
    w.type = type;
    w.scale_type = ScaleType::f16;
    w.in_features = in;
    w.out_features = out;
    w.group_size = is_quantized(type) ? group_size : in;
    w.zero_point = type == WeightType::u4 ? 8 : 128;
    w.has_zero_points = zero_points && is_quantized(type);
    layer.buffer.assign(static_cast<size_t>(w.buffer_bytes()), 0);
    w.bind(layer.buffer.data());
    std::normal_distribution<float> normal;
    const auto fill16 = [&](int64_t begin, int64_t end, int shift, uint16_t base) {
        for (int64_t at = begin; at + 2 <= end; at += 2) {
            const auto half = static_cast<uint16_t>(base + (random() >> shift));
            std::memcpy(layer.buffer.data() + at, &half, 2);
        }
    };
    const int64_t rows_end = in * w.row_bytes();
    if (type == WeightType::f32) {
        for (int64_t at = 0; at < rows_end; at += 4) {
            const float value = normal(random);
            std::memcpy(layer.buffer.data() + at, &value, 4);
        }
    } else if (!is_quantized(type)) {
        fill16(0, rows_end, 24, type == WeightType::f16 ? 0x3800 : 0x3f00);
    } else {
        for (int64_t at = 0; at < rows_end; ++at) {
            layer.buffer[static_cast<size_t>(at)] = static_cast<uint8_t>(random());
        }
        fill16(w.scales_offset(), w.zero_points_offset(), 23, 0x2c00);
        for (int64_t at = w.zero_points_offset(); at < w.bias_offset(); ++at) {
            layer.buffer[static_cast<size_t>(at)] =
                static_cast<uint8_t>(random() & (type == WeightType::u4 ? 15 : 255));
        }
    }
    layer.dense.resize(static_cast<size_t>(in * out));
    for (int64_t i = 0; i < in; ++i) {
        for (int64_t o = 0; o < out; ++o) {
            layer.dense[static_cast<size_t>(i * out + o)] = value_at(w, i, o);
        }
    }
    return layer;
}

double relative_error(const Layer& layer, const std::vector<float>& x, int64_t rows, Threshold t, const float* y) {
    const int64_t in = layer.weights.in_features, out = layer.weights.out_features;
    double worst = 0.0, largest = 1e-9;
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t o = 0; o < out; ++o) {
            double sum = 0.0;
            for (int64_t i = 0; i < in; ++i) {
                const float d = x[static_cast<size_t>(m * in + i)] - t.mode;
                const float compared = t.scale == nullptr ? std::fabs(d) : t.scale[i] * std::fabs(d);
                sum += compared <= t.threshold ? 0.0 : d * layer.dense[static_cast<size_t>(i * out + o)];
            }
            worst = std::max(worst, std::fabs(sum - y[m * out + o]));
            largest = std::max(largest, std::fabs(sum));
        }
    }
    return worst / largest;
}

/// As many scales as channels, 0 among them.
std::vector<float> scales_for(int64_t channels) {
    std::vector<float> scales(static_cast<size_t>(channels));
    for (size_t i = 0; i < scales.size(); ++i) {
        scales[i] = static_cast<float>((i + 1) % 5) * 0.5f;
    }
    return scales;
}

/// Whether the whole FFN gives, bit for bit, what its layers give one by one.
bool is_composition(const Layer& gate, const Layer& up, const Layer& down, int64_t rows, bool scaled,
                    std::mt19937& random) {
    const int64_t in = gate.weights.in_features, hidden = gate.weights.out_features;
    const std::vector<float> scale = scales_for(in), hidden_scale = scales_for(hidden);
    const Threshold t{0.1f, 0.3f, scaled ? scale.data() : nullptr};
    const Threshold hidden_t{0.05f, 0.2f, scaled ? hidden_scale.data() : nullptr};
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(rows * in)), h(static_cast<size_t>(rows * hidden)), u(h.size());
    for (float& value : x) {
        value = normal(random);
    }
    std::vector<float> expected(static_cast<size_t>(rows * down.weights.out_features)), y(expected.size());
    for (int64_t first = 0; first < rows; first += 256) {  // as many rows as share what is pruned altogether
        const int64_t n = std::min<int64_t>(rows - first, 256);
        float* hu[] = {h.data(), u.data()};
        sparse_linear(x.data() + first * in, n, t, {gate.weights, up.weights}, Arithmetic{}, hu);
        apply_activation(Activation::silu, h.data(), u.data(), n * hidden);
        float* out = expected.data() + first * down.weights.out_features;
        sparse_linear(h.data(), n, hidden_t, {down.weights}, Arithmetic{}, &out);
    }
    sparse_ffn(x.data(), rows, t, hidden_t, Activation::silu, {gate.weights, up.weights, down.weights},
               Arithmetic{}, y.data());
    return y == expected;
}

int run(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    int failures = 0;
    for (const WeightType type :
         {WeightType::f32, WeightType::f16, WeightType::bf16, WeightType::u8, WeightType::u4}) {
        for (const auto& [in, out, group] :
             {std::array<int64_t, 3>{1, 1, 1}, {17, 3, 5}, {300, 130, 128}, {64, 700, 64}}) {
            const Layer a = make_layer(type, in, out, group, true, random);
            const Layer b = make_layer(type, in, out + 1, in, false, random);
            const std::vector<float> scale = scales_for(in);
            for (const int64_t rows : {1, 2, 7, 17, 33}) {
                for (const Threshold t : {Threshold{0.25f, 0.0f}, Threshold{0.25f, 0.7f}, Threshold{0.25f, 100.0f},
                                          Threshold{0.25f, 0.7f, scale.data()}}) {
                    std::vector<float> x(static_cast<size_t>(rows * in));
                    for (float& value : x) {
                        value = normal(random);
                    }
                    x[0] *= 1000.0f;
                    std::vector<float> ya(static_cast<size_t>(rows * out)), yb(static_cast<size_t>(rows * (out + 1)));
                    float* y[] = {ya.data(), yb.data()};
                    for (const Arithmetic arithmetic : {Arithmetic{Precision::f32}, Arithmetic{Precision::split},
                                                        Arithmetic{Precision::split, 32}}) {
                        sparse_linear(x.data(), rows, t, {a.weights, b.weights}, arithmetic, y);
                        const double error =
                            std::max(relative_error(a, x, rows, t, y[0]), relative_error(b, x, rows, t, y[1]));
                        if (!(error < (arithmetic.activation_group_size == 0 ? 1e-3 : 2e-2))) {
                            std::printf("type %d in %ld out %ld rows %ld threshold %g: %g\n", int(type), long(in),
                                        long(out), long(rows), double(t.threshold), error);
                            ++failures;
                        }
                    }
                }
            }
            const Layer down = make_layer(type, out, in, group, true, random);
            const Layer up = make_layer(WeightType::u8, in, out, group, false, random);
            for (const int64_t rows : {1, 5, 20, 100, 270}) {
                for (const bool scaled : {false, true}) {
                    if (!is_composition(a, up, down, rows, scaled, random)) {
                        std::printf("type %d in %ld out %ld rows %ld: the FFN is not that of its layers\n", int(type),
                                    long(in), long(out), long(rows));
                        ++failures;
                    }
                }
            }
            // The float fallback: only that it touches nothing it must not.
            std::vector<float> x(static_cast<size_t>(3 * in), 1.0f), y(static_cast<size_t>(3 * in));
            x.back() = INFINITY;
            for (const int64_t rows : {1, 3}) {
                sparse_ffn(x.data() + (rows == 1 ? 2 * in : 0), rows, Threshold{0, 0.1f}, Threshold{0, 0.1f},
                           Activation::silu, {a.weights, a.weights, down.weights}, Arithmetic{}, y.data());
            }
        }
    }
    return failures;
}

}  // namespace

int main() {
    int failures[2] = {};
    std::thread other([&] {
        failures[1] = run(2);
    });
    failures[0] = run(1);
    other.join();
    return failures[0] + failures[1] == 0 ? 0 : 1;
}
