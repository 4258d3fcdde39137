// Batch norm, ReLU and shortcut on CPU tensors: forward, backward, each one pass over memory.
//
// Threads share the images. Nothing depends on their timing: with the same number of threads a
// result is the same bit for bit.

#include "simd.h"

namespace fastres {
namespace {

template <class T>
void stats(const T* y, BatchNorm bn, int64_t images, int64_t pixels, int64_t channels) {
  const Blocks blocks(pixels, channels);
  std::vector<RunningStats> per_thread(omp_get_max_threads(), RunningStats(blocks));
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < images; ++n) per_thread[omp_get_thread_num()].add(y + n * blocks.size());
  bn.finalize(per_thread, channels);
}

// out = relu(a * y + b + shortcut), or with a_s * shortcut + b_s.
template <class T, bool kShortcut, bool kRelu>
void apply(const T* y, const float* scale_shift, const T* shortcut,
           const float* shortcut_scale_shift, T* out, int64_t images, int64_t pixels,
           int64_t channels) {
  const Blocks blocks(pixels, channels);
  const int64_t width = blocks.width;
  const auto scale = repeat(scale_shift, channels, width);
  auto shift = repeat(scale_shift + channels, channels, width);
  std::vector<float> shortcut_scale(width, 1.0f);
  if (shortcut_scale_shift) {
    shortcut_scale = repeat(shortcut_scale_shift, channels, width);
    for (int64_t j = 0; j < width; ++j) shift[j] += shortcut_scale_shift[channels + j % channels];
  }
  const float *a = scale.data(), *b = shift.data(), *a_s = shortcut_scale.data();
#pragma omp parallel
  {
    std::vector<float> buffer(width);
    float* values = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < images * blocks.count; ++i) {
      const T *from = y + i * width, *also = kShortcut ? shortcut + i * width : nullptr;
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        float z = a[j] * widen(from[j]) + b[j];
        if (kShortcut) z += a_s[j] * widen(also[j]);
        values[j] = kRelu ? relu(z) : z;
      }
      narrow(values, out + i * width, width);
    }
  }
}

// g = dout where the ReLU let z through, told by out or from y by scale_shift, and its sums.
template <class T>
void reduce(const T* dout, const T* y, const T* out, const float* scale_shift, const float* mean,
            const T* y_shortcut, const float* mean_shortcut, T* g, double* sums,
            double* sums_shortcut, int64_t images, int64_t pixels, int64_t channels) {
  const Blocks blocks(pixels, channels);
  const int64_t size = blocks.size();
  std::vector<GradSums> per_thread(omp_get_max_threads(), GradSums(blocks, mean, scale_shift));
  std::vector<GradSums> projected(y_shortcut ? omp_get_max_threads() : 0,
                                  GradSums(blocks, mean_shortcut, nullptr));
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < images; ++n) {
    const int thread = omp_get_thread_num();
    const T *from = dout + n * size, *raw = y + n * size;
    T* to = g + n * size;
    if (scale_shift)
      per_thread[thread].add_masked_by_y(from, raw, to);
    else
      per_thread[thread].add_masked_by_out(from, out ? out + n * size : nullptr, raw, to);
    // g is in the second-level cache now: the projection's sums read only its y from memory.
    if (y_shortcut)
      projected[thread].add_masked_by_out(to, static_cast<const T*>(nullptr), y_shortcut + n * size,
                                          to);
  }
  total(per_thread, sums);
  if (y_shortcut) total(projected, sums_shortcut);
}

template <class T>
void compute_dy(const T* g, const T* y, const float* coefficients, T* dy, int64_t images,
                int64_t pixels, int64_t channels) {
  const Blocks blocks(pixels, channels);
  const int64_t width = blocks.width;
  const ComputeDy compute(coefficients, width, channels);
#pragma omp parallel
  {
    std::vector<float> values(width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < images * blocks.count; ++i)
      compute(g + i * width, y + i * width, values.data(), dy + i * width);
  }
}

template <class T>
void apply_any(const T* y, const float* scale_shift, const T* shortcut,
               const float* shortcut_scale_shift, T* out, int64_t images, int64_t pixels,
               int64_t channels, bool with_relu) {
  if (shortcut && with_relu)
    apply<T, true, true>(y, scale_shift, shortcut, shortcut_scale_shift, out, images, pixels,
                         channels);
  else if (shortcut)
    apply<T, true, false>(y, scale_shift, shortcut, shortcut_scale_shift, out, images, pixels,
                          channels);
  else if (with_relu)
    apply<T, false, true>(y, scale_shift, shortcut, shortcut_scale_shift, out, images, pixels,
                          channels);
  else
    apply<T, false, false>(y, scale_shift, shortcut, shortcut_scale_shift, out, images, pixels,
                           channels);
}

}  // namespace
}  // namespace fastres

using namespace fastres;

// Coefficients of dy = c0 * g + c1 * y + c2, and the gradients of gamma and beta.
extern "C" void defer_dy(const double* sum_g, const double* sum_gy, const float* mean,
                         const float* rstd, const float* gamma, int64_t count, int64_t channels,
                         float* dgamma, float* dbeta, float* coefficients) {
  for (int64_t c = 0; c < channels; ++c) {
    const double r = rstd[c], scale = gamma[c] * r;
    const double along_y = -scale * r * r * sum_gy[c] / count;
    dgamma[c] = static_cast<float>(sum_gy[c] * r);
    dbeta[c] = static_cast<float>(sum_g[c]);
    coefficients[c] = static_cast<float>(scale);
    coefficients[channels + c] = static_cast<float>(along_y);
    coefficients[2 * channels + c] =
        static_cast<float>(-along_y * mean[c] - scale * sum_g[c] / count);
  }
}

#define FASTRES_FOR_TYPE(T, NAME)                                                                  \
  extern "C" void bn_stats_##NAME(const T* y, const float* gamma, const float* beta, double eps,   \
                                  float* out, int64_t images, int64_t pixels, int64_t channels) {  \
    stats(y, {gamma, beta, eps, out}, images, pixels, channels);                                   \
  }                                                                                                \
  extern "C" void bn_apply_##NAME(const T* y, const float* scale_shift, const T* shortcut,         \
                                  const float* shortcut_scale_shift, T* out, int64_t images,       \
                                  int64_t pixels, int64_t channels, int64_t with_relu) {           \
    apply_any(y, scale_shift, shortcut, shortcut_scale_shift, out, images, pixels, channels,       \
              with_relu);                                                                          \
  }                                                                                                \
  extern "C" void bn_reduce_##NAME(                                                                \
      const T* dout, const T* y, const T* out, const float* scale_shift, const float* mean,        \
      const T* y_shortcut, const float* mean_shortcut, T* g, double* sums, double* sums_shortcut,  \
      int64_t images, int64_t pixels, int64_t channels) {                                          \
    reduce(dout, y, out, scale_shift, mean, y_shortcut, mean_shortcut, g, sums, sums_shortcut,     \
           images, pixels, channels);                                                              \
  }                                                                                                \
  extern "C" void bn_compute_dy_##NAME(const T* g, const T* y, const float* coefficients, T* dy,   \
                                       int64_t images, int64_t pixels, int64_t channels) {         \
    compute_dy(g, y, coefficients, dy, images, pixels, channels);                                  \
  }

FASTRES_FOR_TYPE(bf16, bf16)
FASTRES_FOR_TYPE(float, fp32)
