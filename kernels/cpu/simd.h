// Numbers, blocks and per-image steps of batch norm that all CPU kernels share.
//
// Tensors are NHWC, dense: an image is `pixels` rows of `channels` numbers. Letters are those of
// the Triton kernels: y raw convolution output, z = a * y + b, g gradient of z, dy = c0*g + c1*y +
// c2. Sums and per-channel numbers are fp32 or wider; storage rounds to nearest even.
#pragma once

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastres {

using bf16 = uint16_t;

inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float widen(float value) { return value; }

inline void put(bf16* out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // Rounding up could turn a NaN into an infinity or a zero: it is cut, and kept quiet.
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = static_cast<bf16>(is_nan ? (bits >> 16) | 0x40 : rounded);
}

// Round a row of results; loops compute into a small fp32 buffer first, since compilers cannot
// vectorise the rounding itself well.
inline void narrow(const float* values, float* out, int64_t size) {
  std::memcpy(out, values, size * sizeof(float));
}
inline void narrow(const float* values, bf16* out, int64_t size) {
  int64_t j = 0;
#ifdef __AVX512BF16__
  for (; j + 16 <= size; j += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + j)));
#endif
  for (; j < size; ++j) put(out + j, values[j]);
}

// max(z, 0) that lets NaN through, and its gradient's mask, which does so too.
inline float relu(float z) { return z < 0 ? 0 : z; }
inline float relu_grad(float out, float dout) { return out <= 0 ? 0 : dout; }

// How loops divide an image: `count` blocks of whole pixels, `width` numbers each. Per-channel
// numbers are repeated over a block once, so that inner loops run over plain contiguous arrays
// whatever the number of channels. Blocks divide the image, so nothing is left over.
struct Blocks {
  int64_t channels, width, count;

  Blocks(int64_t pixels, int64_t channels) : channels(channels) {
    int64_t rows = std::max<int64_t>(1, std::min(pixels, 512 / channels));
    while (pixels % rows) --rows;
    width = rows * channels;
    count = pixels / rows;
  }
  int64_t size() const { return width * count; }
};

// One number a channel, repeated to `width`, a multiple of channels; zeros where there is nothing
// to repeat.
inline std::vector<float> repeat(const float* values, int64_t channels, int64_t width) {
  std::vector<float> repeated(width, 0.0f);
  if (values)
    for (int64_t j = 0; j < width; j += channels)
      std::copy(values, values + channels, repeated.begin() + j);
  return repeated;
}

// Numbers that are added up in float, lane by lane: few, so that their rounding is none to speak of.
constexpr int64_t kFloatSums = 16;

// Count, mean and M2 (sum of squared distances from the mean) of every lane of a block. Chunks are
// summed by two passes while they are in the first-level cache, then merged after Chan, Golub and
// LeVeque (1979): no difference of large squares anywhere.
class RunningStats {
 public:
  explicit RunningStats(const Blocks& blocks)
      : blocks_(blocks),
        mean_(blocks.width),
        m2_(blocks.width),
        sum_(blocks.width),
        distance_(blocks.width) {}

  template <class T>
  void add(const T* y) {
    for (int64_t first = 0; first < blocks_.count; first += kFloatSums)
      add_chunk(y + first * blocks_.width, std::min(kFloatSums, blocks_.count - first));
  }

  // Merge the lanes of one channel into count, mean and M2.
  void merge_into(int64_t channel, double* count, double* mean, double* m2) const {
    if (!count_) return;
    for (int64_t j = channel; j < blocks_.width; j += blocks_.channels) {
      const double n = count_, total = *count + n, delta = mean_[j] - *mean;
      *mean += delta * n / total;
      *m2 += m2_[j] + delta * delta * *count * n / total;
      *count = total;
    }
  }

 private:
  template <class T>
  void add_chunk(const T* y, int64_t rows) {
    const int64_t width = blocks_.width;
    float *sum = sum_.data(), *distance = distance_.data(), *mean = mean_.data(), *m2 = m2_.data();
    std::fill(sum, sum + width, 0.0f);
    std::fill(distance, distance + width, 0.0f);
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) sum[j] += widen(y[i * width + j]);
    const float inverse = 1.0f / rows;
    for (int64_t j = 0; j < width; ++j) sum[j] *= inverse;
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        const float d = widen(y[i * width + j]) - sum[j];
        distance[j] += d * d;
      }
    const float n = count_, share = rows / (n + rows), weight = n * share;
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const float delta = sum[j] - mean[j];
      mean[j] += delta * share;
      m2[j] += distance[j] + delta * delta * weight;
    }
    count_ += rows;
  }

  Blocks blocks_;
  int64_t count_ = 0;
  std::vector<float> mean_, m2_, sum_, distance_;
};

// What a batch norm is made of: parameters in, (channels) each; out in `stats` (5, channels): mean,
// unbiased variance, rstd, and z = a * y + b: a, b.
struct BatchNorm {
  const float *gamma, *beta;
  double eps;
  float* stats;

  // Fill the outputs from the statistics of all threads.
  void finalize(const std::vector<RunningStats>& per_thread, int64_t channels) const {
    float *mean = stats, *unbiased_var = mean + channels, *rstd = unbiased_var + channels;
    float* scale_shift = rstd + channels;
    for (int64_t c = 0; c < channels; ++c) {
      double count = 0, average = 0, m2 = 0;
      for (const RunningStats& own : per_thread) own.merge_into(c, &count, &average, &m2);
      const double scale = 1 / std::sqrt(m2 / count + eps);
      mean[c] = static_cast<float>(average);
      unbiased_var[c] = static_cast<float>(m2 / (count - 1));
      rstd[c] = static_cast<float>(scale);
      scale_shift[c] = gamma[c] * rstd[c];
      scale_shift[channels + c] = beta[c] - mean[c] * scale_shift[c];
    }
  }
};

// dy = c0 * g + c1 * y + c2 along a row of `width` numbers.
class ComputeDy {
 public:
  ComputeDy(const float* coefficients, int64_t width, int64_t channels)
      : width_(width),
        c0_(repeat(coefficients, channels, width)),
        c1_(repeat(coefficients + channels, channels, width)),
        c2_(repeat(coefficients + 2 * channels, channels, width)) {}

  // values: room for `width` numbers.
  template <class T>
  void operator()(const T* g, const T* y, float* values, T* dy) const {
    const float *c0 = c0_.data(), *c1 = c1_.data(), *c2 = c2_.data();
#pragma GCC ivdep
    for (int64_t j = 0; j < width_; ++j)
      values[j] = c0[j] * widen(g[j]) + c1[j] * widen(y[j]) + c2[j];
    narrow(values, dy, width_);
  }

 private:
  int64_t width_;
  std::vector<float> c0_, c1_, c2_;
};

// Sums over pixels of g and of g * (y - mean), by channel, for the backward of a batch norm.
class GradSums {
 public:
  // scale_shift: of the batch norm, where the ReLU's mask is to be told from y; else null.
  GradSums(const Blocks& blocks, const float* mean, const float* scale_shift)
      : blocks_(blocks),
        mean_(repeat(mean, blocks.channels, blocks.width)),
        scale_(repeat(scale_shift, blocks.channels, blocks.width)),
        shift_(repeat(scale_shift ? scale_shift + blocks.channels : nullptr, blocks.channels,
                      blocks.width)),
        g_(blocks.width),
        gy_(blocks.width),
        values_(blocks.width),
        sums_(2 * blocks.channels) {}

  // Store g = dout where the ReLU let a * y + b through, and add its sums; g may be dout.
  template <class T>
  void add_masked_by_y(const T* dout, const T* y, T* g) {
    const float *a = scale_.data(), *b = shift_.data();
    add_image(y, g, [=](int64_t i, int64_t j) {
      return relu_grad(a[j] * widen(y[i + j]) + b[j], widen(dout[i + j]));
    });
  }

  // The same with a mask told by out; null: all of dout.
  template <class T>
  void add_masked_by_out(const T* dout, const T* out, const T* y, T* g) {
    if (out)
      add_image(y, g, [=](int64_t i, int64_t j) {
        return relu_grad(widen(out[i + j]), widen(dout[i + j]));
      });
    else
      add_image(y, g, [=](int64_t i, int64_t j) { return widen(dout[i + j]); });
  }

  const std::vector<double>& sums() const { return sums_; }

 private:
  // value(i, j): g of element i + j, in lane j of the block that begins at i.
  template <class T, class Value>
  void add_image(const T* y, T* g, const Value& value) {
    for (int64_t first = 0; first < blocks_.count; first += kFloatSums) {
      const int64_t end = std::min(first + kFloatSums, blocks_.count) * blocks_.width;
      for (int64_t i = first * blocks_.width; i < end; i += blocks_.width)
        add_block(y + i, g + i, [=](int64_t j) { return value(i, j); });
      flush();
    }
  }

  template <class T, class Value>
  void add_block(const T* y, T* g, const Value& value) {
    float *sum_g = g_.data(), *sum_gy = gy_.data(), *values = values_.data();
    const float* mean = mean_.data();
#pragma GCC ivdep
    for (int64_t j = 0; j < blocks_.width; ++j) {
      const float v = value(j);
      sum_g[j] += v;
      sum_gy[j] += v * (widen(y[j]) - mean[j]);
      values[j] = v;
    }
    narrow(values, g, blocks_.width);
  }

  // Move the sums from the lanes to the channels.
  void flush() {
    const int64_t channels = blocks_.channels;
    for (int64_t j = 0; j < blocks_.width; j += channels)
      for (int64_t c = 0; c < channels; ++c) {
        sums_[c] += g_[j + c];
        sums_[channels + c] += gy_[j + c];
      }
    std::fill(g_.begin(), g_.end(), 0.0f);
    std::fill(gy_.begin(), gy_.end(), 0.0f);
  }

  Blocks blocks_;
  std::vector<float> mean_, scale_, shift_, g_, gy_, values_;
  std::vector<double> sums_;
};

// Add up the sums of all threads, in their order.
inline void total(const std::vector<GradSums>& per_thread, double* sums) {
  const size_t size = per_thread[0].sums().size();
  std::fill(sums, sums + size, 0.0);
  for (const GradSums& own : per_thread)
    for (size_t i = 0; i < size; ++i) sums[i] += own.sums()[i];
}

}  // namespace fastres
