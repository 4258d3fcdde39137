// Convolutions of bf16 tensors on CPUs with bfloat16 instructions: 3x3 with padding 1 and stride 1
// or 2, and 1x1 with stride 2.
//
//   fprop     y = conv(x'), x' = x or relu(a * x + b) computed while loading; and the batch
//             norm of y
//   folded    out = relu(a * conv(x) + b + residual), for inference
//   backward  dx and dw from dy = c0 * g + c1 * y + c2, computed while loading; x' as above; dx
//             gets the shortcut's gradient added, or the mask and the sums of the producer's norm
//
// Letters: x (N, H, W, C), w (K, R, R, C), y (N, P, Q, K). A thread takes one image through all
// steps while it lies in the second-level cache, so that only x, y, g and dx cross memory. The
// products use vdpbf16ps: a vector of 16 sums, each growing by two products. Forward and dx keep 16
// output channels in a vector and pair input channels; dw pairs neighbouring pixels. C and K must
// be 16, 32 or 64, or C the 3 of an image, and Q at least 8; with stride 2 C may also be 128 and K
// 128 or 256, and H and W are even.
//
// Numerics: operands rounded to bf16, sums in fp32, as oneDNN computes. dw is added up image by
// image and then thread by thread: equal bit for bit for the same number of threads.

#include "conv.h"

#ifdef __AVX512BF16__

namespace fastres {
namespace {

struct Dense {
  template <int kC, int kPixels, int kVectors>
  static constexpr Convolve run = convolve<3, kC, kPixels, kVectors, 1>;
};

// y, or relu(a * y + b + residual), image by image; `done(n)` follows while image n is in the
// cache.
template <class Done>
void forward(const bf16* x, const float* in_scale_shift, const bf16* w, bf16* y, Epilogue epilogue,
             const Shape& s, const Done& done) {
  const int64_t depth = depth_of(s.in), row = s.width * s.in, size = s.out_pixels() * s.out;
  const auto packed = pack<false>(w, s.taps, s.in, s.out);
  const auto run = (s.stride == 1 ? dense : strided)(s.taps, depth, s.out_width(), s.out);
  const Prologue prologue(in_scale_shift, s.width, s.in);
#pragma omp parallel
  {
    const auto padded = buffer<bf16>(s.padded_x());
    const auto values = buffer<float>(row);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < s.images; ++n) {
      const bf16* image = x + n * s.height * row;
      fill_padded(padded.get(), s.height, s.width, depth, s.border(),
                  [&](int64_t h, bf16* to) { prologue(image + h * row, values.get(), to); });
      Epilogue own = epilogue;
      if (own.residual) own.residual += n * size;
      const bool last = n + 1 == s.images;
      const Prefetch next{{last ? nullptr : image + s.height * row}, s.stride * row};
      run({padded.get(), packed.get(), y + n * size, s.out_height(), s.out_width(), s.out,
           s.x_row(), s.y_row()},
          own, next);
      done(n);
    }
  }
}

// Pixels side by side that meet neighbouring dy: pairs[i] = (padded[i], padded[i + distance]).
void pair_pixels(const bf16* padded, uint32_t* pairs, int64_t size, int64_t distance) {
  for (int64_t i = 0; i + distance < size; ++i)
    pairs[i] = padded[i] | static_cast<uint32_t>(padded[i + distance]) << 16;
  for (int64_t i = size - distance; i < size; ++i) pairs[i] = padded[i];
}

// dy in pairs of pixels (P, ceil(Q / 2), K) from its padded rows; an odd row ends in a zero.
void pair_dy(const bf16* padded, uint32_t* pairs, const Shape& s) {
  for (int64_t p = 0; p < s.out_height(); ++p) {
    const bf16* row = padded + (p + s.border()) * s.dy_row() + s.border() * s.out;
    for (int64_t q = 0; q < s.out_width(); q += 2, pairs += s.out) {
      const bool has_next = s.border() || q + 1 < s.out_width();
      for (int64_t k = 0; k < s.out; ++k) {
        const uint32_t next = has_next ? row[(q + 1) * s.out + k] : 0;
        pairs[k] = row[q * s.out + k] | next << 16;
      }
    }
  }
}

// Some of the pixels, in pairs: some rows of some images.
struct Patch {
  const uint32_t *x, *dy;
  int64_t x_image, x_row, dy_image, dy_row;
  int64_t images, rows, pairs, depth, channels, stride, taps;
};

// dw of one filter row: kTaps taps, kChannels input channels, 16 output channels, summed over a
// patch. kPairs: pairs of pixels in a row, where the compiler shall know them; else 0.
template <int kTaps, int kChannels, int kPairs>
void wgrad_tile(const Patch& patch, const uint32_t* x, const uint32_t* dy, float* dw) {
  const int64_t depth = patch.depth, channels = patch.channels, step = 2 * patch.stride * depth;
  __m512 sum[kTaps][kChannels];
  for (int t = 0; t < kTaps; ++t)
    for (int c = 0; c < kChannels; ++c) sum[t][c] = _mm512_loadu_ps(dw + (t * depth + c) * kLanes);
  for (int64_t i = 0; i < patch.images; ++i)
    for (int64_t h = 0; h < patch.rows; ++h) {
      const uint32_t* source = x + i * patch.x_image + h * patch.stride * patch.x_row;
      const uint32_t* gradient = dy + i * patch.dy_image + h * patch.dy_row;
      const int64_t pairs = kPairs ? kPairs : patch.pairs;
#pragma GCC unroll 4
      for (int64_t q = 0; q < pairs; ++q, source += step, gradient += channels) {
        const __m512i pair = _mm512_loadu_si512(gradient);
#pragma GCC unroll 3
        for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 8
          for (int c = 0; c < kChannels; ++c)
            sum[t][c] = multiply_add(sum[t][c], pair, source + t * depth + c);
      }
    }
  for (int t = 0; t < kTaps; ++t)
    for (int c = 0; c < kChannels; ++c) _mm512_storeu_ps(dw + (t * depth + c) * kLanes, sum[t][c]);
}

// All tiles of dw (K / 16, taps, taps, depth, 16) over one patch.
void wgrad_patch(const Patch& patch, float* dw) {
  const int64_t depth = patch.depth, taps = patch.taps, step = depth == 4 ? 4 : 8;
  const auto tile = taps == 1           ? wgrad_tile<1, 8, 0>
                    : depth == 4        ? wgrad_tile<3, 4, 0>
                    : patch.pairs == 4  ? wgrad_tile<3, 8, 4>
                    : patch.pairs == 8  ? wgrad_tile<3, 8, 8>
                    : patch.pairs == 16 ? wgrad_tile<3, 8, 16>
                                        : wgrad_tile<3, 8, 0>;
  for (int64_t k = 0; k < patch.channels; k += kLanes)
    for (int64_t r = 0; r < taps; ++r)
      for (int64_t c = 0; c < depth; c += step) {
        float* sums = dw + ((k / kLanes * taps + r) * taps * depth + c) * kLanes;
        const uint32_t* source = patch.x + r * patch.x_row + c;
        tile(patch, source, patch.dy + k, sums);
      }
}

// Sum dw over a group of images: small ones together, so that dw is loaded and stored seldom; large
// ones a few rows at a time, so that these stay in the first-level cache for all tiles.
void wgrad(const uint32_t* x, const uint32_t* dy, float* dw, int64_t group, const Shape& s) {
  constexpr int64_t kCache = 16 << 10;
  const int64_t pairs = (s.out_width() + 1) / 2, x_row = s.x_row(), dy_row = pairs * s.out;
  Patch patch{x,      dy,       s.padded_x(),   x_row, s.out_height() * dy_row,
              dy_row, group,    s.out_height(), pairs, depth_of(s.in),
              s.out,  s.stride, s.taps};
  const int64_t fitting = (kCache / (x_row * 4) - 2) / s.stride;
  if (patch.x_image * 4 <= 3 * kCache || fitting < 2) return wgrad_patch(patch, dw);
  patch.images = 1;
  for (int64_t i = 0; i < group; ++i)
    for (int64_t p = 0; p < s.out_height(); p += fitting) {
      patch.x = x + i * patch.x_image + p * s.stride * x_row;
      patch.dy = dy + i * patch.dy_image + p * dy_row;
      patch.rows = std::min(fitting, s.out_height() - p);
      wgrad_patch(patch, dw);
    }
}

// Add up the threads' dw and store it as (K, taps, taps, C).
void store_dw(const std::vector<Buffer<float>>& partials, bf16* dw, const Shape& s) {
  const int64_t depth = depth_of(s.in), taps = s.taps * s.taps, size = depth * kLanes;
#pragma omp parallel
  {
    std::vector<float> sum(size);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.out / kLanes * taps; ++i) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const auto& partial : partials)
        for (int64_t j = 0; j < size; ++j) sum[j] += partial[i * size + j];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t k = i / taps * kLanes + lane;
        bf16* to = dw + (k * taps + i % taps) * s.in;
        for (int64_t c = 0; c < s.in; ++c) put(to + c, sum[c * kLanes + lane]);
      }
    }
  }
}

// Both gradients of a convolution, image by image; what its threads share.
struct Backward {
  const bf16 *g, *y, *x, *shortcut;
  bf16* dx;
  bool has_producer;
  Shape s;
  ComputeDy compute_dy;
  Prologue prologue;
  Buffer<bf16> flipped;
  Convolve run;

  // Store dx of image n, and leave x and dy in pairs for dw. padded and values are scratch.
  void image(int64_t n, bf16* padded, float* values, uint32_t* x_pairs, uint32_t* y_pairs,
             GradSums* sums) const {
    const int64_t x_row = s.width * s.in, y_row = s.y_row(), depth = depth_of(s.in);
    const int64_t x_image = n * s.height * x_row, y_image = n * s.out_height() * y_row;
    fill_padded(padded, s.out_height(), s.out_width(), s.out, s.border(),
                [&](int64_t p, bf16* row) {
                  compute_dy(g + y_image + p * y_row, y + y_image + p * y_row, values, row);
                });
    pair_dy(padded, y_pairs, s);
    if (dx) {
      const Epilogue epilogue{nullptr, 0, shortcut ? shortcut + x_image : nullptr, false};
      run({padded, flipped.get(), dx + x_image, s.height, s.width, s.in, s.dy_row(), x_row},
          epilogue, next_after(n));
      if (has_producer) sums->add_masked_by_y(dx + x_image, x + x_image, dx + x_image);
    }
    fill_padded(padded, s.height, s.width, depth, s.border(),
                [&](int64_t h, bf16* row) { prologue(x + x_image + h * x_row, values, row); });
    pair_pixels(padded, x_pairs, s.padded_x(), s.stride * depth);
  }

 private:
  Prefetch next_after(int64_t n) const {
    if (n + 1 == s.images) return {{}, 0};
    const int64_t size = s.out_pixels() * s.out, next = (n + 1) * size;
    const bool same = s.stride == 1 && s.in == s.out;
    return {{g + next, y + next, same ? x + next : nullptr}, size / s.height};
  }
};

}  // namespace

Convolve dense(int64_t, int64_t depth, int64_t width, int64_t channels) {
  return of_depth<Dense, 4, 16, 32, 64>(depth, width, channels);
}

}  // namespace fastres

using namespace fastres;

extern "C" int64_t has_fused_conv() { return 1; }

extern "C" void conv_fprop(const bf16* x, const float* in_scale_shift, const bf16* w, bf16* y,
                           const float* gamma, const float* beta, double eps, float* stats,
                           int64_t images, int64_t height, int64_t width, int64_t in, int64_t out,
                           int64_t stride, int64_t taps) {
  const Shape s{images, height, width, in, out, stride, taps};
  const Blocks blocks(s.out_pixels(), out);
  std::vector<RunningStats> per_thread(omp_get_max_threads(), RunningStats(blocks));
  forward(x, in_scale_shift, w, y, {}, s,
          [&](int64_t n) { per_thread[omp_get_thread_num()].add(y + n * blocks.size()); });
  BatchNorm{gamma, beta, eps, stats}.finalize(per_thread, out);
}

extern "C" void conv_folded(const bf16* x, const bf16* w, const float* scale_shift,
                            const bf16* residual, bf16* out, int64_t images, int64_t height,
                            int64_t width, int64_t in, int64_t channels, int64_t stride,
                            int64_t taps, int64_t with_relu) {
  const Shape s{images, height, width, in, channels, stride, taps};
  const Epilogue epilogue{scale_shift, channels, residual, with_relu != 0};
  forward(x, nullptr, w, out, epilogue, s, [](int64_t) {});
}

extern "C" void conv_backward(const bf16* g, const bf16* y, const float* coefficients,
                              const bf16* x, const float* in_scale_shift, const float* mean,
                              const bf16* w, const bf16* shortcut, bf16* dx, bf16* dw, double* sums,
                              int64_t images, int64_t height, int64_t width, int64_t in,
                              int64_t out, int64_t stride, int64_t taps) {
  const Shape s{images, height, width, in, out, stride, taps};
  const int64_t x_size = s.padded_x(), y_size = s.out_height() * ((s.out_width() + 1) / 2) * out;
  const Backward backward{
      g,
      y,
      x,
      shortcut,
      dx,
      in_scale_shift != nullptr,
      s,
      ComputeDy(coefficients, s.y_row(), out),
      Prologue(in_scale_shift, width, in),
      dx ? pack<true>(w, taps, out, in) : nullptr,
      dx ? (stride == 1 ? dense : strided_dx)(taps, out, s.out_width(), in) : nullptr};
  // A thread's dw is loaded and stored once a group: images that fill half a second-level cache.
  const int64_t most = std::clamp<int64_t>((1 << 19) / (x_size * 4), 1, 8);
  std::vector<GradSums> grad_sums(omp_get_max_threads(),
                                  GradSums(Blocks(s.pixels(), in), mean, in_scale_shift));
  std::vector<Buffer<float>> partials(omp_get_max_threads());
  for (auto& partial : partials) {
    partial = buffer<float>(s.dw_size());
    std::fill(partial.get(), partial.get() + s.dw_size(), 0.0f);
  }
#pragma omp parallel
  {
    const int thread = omp_get_thread_num();
    const auto padded = buffer<bf16>(std::max(x_size, s.padded_dy()));
    const auto values = buffer<float>(width * std::max(in, out));
    const auto x_pairs = buffer<uint32_t>(most * x_size);
    const auto y_pairs = buffer<uint32_t>(most * y_size);
    // Images go to threads one by one, not in groups: whole groups would leave threads waiting.
    const int64_t threads = omp_get_num_threads(), last = images * (thread + 1) / threads;
    for (int64_t first = images * thread / threads, size; first < last; first += size) {
      size = std::min(most, last - first);
      for (int64_t i = 0; i < size; ++i)
        backward.image(first + i, padded.get(), values.get(), x_pairs.get() + i * x_size,
                       y_pairs.get() + i * y_size, &grad_sums[thread]);
      wgrad(x_pairs.get(), y_pairs.get(), partials[thread].get(), size, s);
    }
  }
  store_dw(partials, dw, s);
  if (in_scale_shift && dx) total(grad_sums, sums);
}

#else

extern "C" int64_t has_fused_conv() { return 0; }

#endif
