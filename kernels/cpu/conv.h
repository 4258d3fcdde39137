// The inner loops of the CPU convolutions: packed filters, padded images, one image's convolution.
//
// A vector holds 16 sums, each growing by two products an instruction: here of 16 output channels
// and a pair of input channels. Filters come packed in that order; x comes padded, made by a
// prologue.
#pragma once

#include "simd.h"

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <memory>

namespace fastres {

constexpr int kLanes = 16;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised memory, aligned to a cache line.
template <class T>
Buffer<T> buffer(int64_t size) {
  const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

// sum[lane] += w[2 * lane] * pair[0] + w[2 * lane + 1] * pair[1]
inline __m512 multiply_add(__m512 sum, __m512i w, const void* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, 4);
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(bits));
}

inline __m512 widen16(const bf16* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// A batch norm and a shortcut behind a convolution: relu(a * sum + b + residual). Null pointers:
// none. A residual lies as the results do.
struct Epilogue {
  const float* scale_shift;
  int64_t channels;
  const bf16* residual;
  bool with_relu;

  bool is_empty() const { return !(scale_shift || residual || with_relu); }
};

// kPixels neighbours of one row, kVectors * 16 output channels.
template <int kPixels, int kVectors>
struct Tile {
  __m512 sum[kPixels][kVectors];

  Tile() {
    for (auto& pixel : sum)
      for (auto& vector : pixel) vector = _mm512_setzero_ps();
  }

  // Add the products with kDepth contiguous numbers of each pixel; pixels are kStep numbers apart.
  template <int kDepth, int kStep>
  void add(const bf16* x, const bf16* w, int64_t w_vector) {
#pragma GCC unroll 1
    for (int c = 0; c < kDepth; c += 2) {
      __m512i filters[kVectors];
      for (int v = 0; v < kVectors; ++v)
        filters[v] = _mm512_loadu_si512(w + v * w_vector + c * kLanes);
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sum[p][v] = multiply_add(sum[p][v], filters[v], x + p * kStep + c);
    }
  }

  // Pixels of out are `step` numbers apart, the first at `offset`.
  void store(bf16* out, int64_t offset, int64_t step, int64_t channel,
             const Epilogue& epilogue) const {
    const float* scale_shift = epilogue.scale_shift;
    const bf16* residual = epilogue.residual;
    if (epilogue.is_empty()) {
      store_each(out, offset, step, [](__m512 z, int, int64_t) { return z; });
      return;
    }
    __m512 a[kVectors], b[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t k = channel + v * kLanes;
      a[v] = scale_shift ? _mm512_loadu_ps(scale_shift + k) : _mm512_set1_ps(1);
      b[v] =
          scale_shift ? _mm512_loadu_ps(scale_shift + epilogue.channels + k) : _mm512_setzero_ps();
    }
    // max(floor, z) in this order: of a number and a NaN the instruction returns the second.
    const __m512 floor = _mm512_set1_ps(epilogue.with_relu ? 0 : -INFINITY);
    if (residual)
      store_each(out, offset, step, [&](__m512 z, int v, int64_t at) {
        z = _mm512_add_ps(_mm512_fmadd_ps(a[v], z, b[v]), widen16(residual + at));
        return _mm512_max_ps(floor, z);
      });
    else
      store_each(out, offset, step, [&](__m512 z, int v, int64_t) {
        return _mm512_max_ps(floor, _mm512_fmadd_ps(a[v], z, b[v]));
      });
  }

 private:
  // Store finish(sum, vector, offset). Unrolled, or the sums would go through memory.
  template <class Finish>
  void store_each(bf16* out, int64_t offset, int64_t step, const Finish& finish) const {
#pragma GCC unroll 32
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = offset + p * step + v * kLanes;
        const __m512 z = finish(sum[p][v], v, at);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), (__m256i)_mm512_cvtneps_pbh(z));
      }
  }
};

// What the thread will read for its next image: prefetched row by row while this one is computed,
// so that it lies in the second-level cache by then.
struct Prefetch {
  const bf16* data[3];
  int64_t row;

  void operator()(int64_t h) const {
    constexpr int64_t kLine = 64 / sizeof(bf16);
    for (const bf16* image : data)
      if (image)
        for (int64_t i = h * row; i < (h + 1) * row; i += kLine)
          _mm_prefetch(image + i, _MM_HINT_T1);
  }
};

// Where a convolution of one image reads and writes: (height, width, channels) results in rows of
// `out_row` numbers, from padded rows of `row` numbers.
struct Plane {
  const bf16 *padded, *w;
  bf16* out;
  int64_t height, width, channels, row, out_row;
};

// Convolve one padded image with filters of kTaps x kTaps. In an NHWC row the taps and channels s,
// c are contiguous: one loop over kTaps * kC numbers. The last tile of a row overlaps the one
// before where the width is no multiple.
template <int kTaps, int kC, int kPixels, int kVectors, int kStride>
void convolve(const Plane& plane, const Epilogue& epilogue, const Prefetch& prefetch) {
  constexpr int64_t kRow = kTaps * kC, kFilter = kTaps * kRow * kLanes;
  for (int64_t k = 0; k < plane.channels; k += kVectors * kLanes)
    for (int64_t h = 0; h < plane.height; ++h) {
      if (k == 0) prefetch(h);
      for (int64_t next = 0; next < plane.width; next += kPixels) {
        const int64_t q = std::min(next, plane.width - kPixels);
        const bf16 *x = plane.padded + h * kStride * plane.row + q * kStride * kC,
                   *w = plane.w + k / kLanes * kFilter;
        Tile<kPixels, kVectors> tile;
        for (int r = 0; r < kTaps; ++r)
          tile.template add<kRow, kStride * kC>(x + r * plane.row, w + r * kRow * kLanes, kFilter);
        tile.store(plane.out, h * plane.out_row + q * plane.channels + k, plane.channels, k,
                   epilogue);
      }
    }
}

using Convolve = void (*)(const Plane&, const Epilogue&, const Prefetch&);

// The convolution of kC channels whose tiles suit rows of `width` tile pixels.
template <class Kind, int kC>
Convolve of_tile(int64_t width, int64_t channels) {
  if (channels % (2 * kLanes) == 0) return Kind::template run<kC, 8, 2>;
  return width >= 16 ? Kind::template run<kC, 16, 1> : Kind::template run<kC, 8, 1>;
}

// That of `depth` channels, one of kDepths.
template <class Kind, int... kDepths>
Convolve of_depth(int64_t depth, int64_t width, int64_t channels) {
  Convolve found = nullptr;
  ((depth == kDepths ? void(found = of_tile<Kind, kDepths>(width, channels)) : void()), ...);
  return found;
}

// y with stride 1, in conv.cpp; with stride 2, in conv_strided.cpp; and its dx from dy.
Convolve dense(int64_t taps, int64_t depth, int64_t width, int64_t channels);
Convolve strided(int64_t taps, int64_t depth, int64_t width, int64_t channels);
Convolve strided_dx(int64_t taps, int64_t depth, int64_t width, int64_t channels);

// The 3 channels of an image are stored as 4, so that they pair.
inline int64_t depth_of(int64_t channels) { return channels == 3 ? 4 : channels; }

// Filters as tiles read them: (out / 16, taps, taps, in / 2, 16, 2). kFlipped: for dx, where output
// and input channels change places and taps are flipped.
template <bool kFlipped>
Buffer<bf16> pack(const bf16* w, int64_t taps, int64_t in, int64_t out) {
  const int64_t depth = depth_of(in), size = taps * taps;
  auto packed = buffer<bf16>(out * size * depth);
  bf16* to = packed.get();
  for (int64_t k0 = 0; k0 < out; k0 += kLanes)
    for (int64_t tap = 0; tap < size; ++tap)
      for (int64_t c = 0; c < depth; c += 2)
        for (int64_t k = k0; k < k0 + kLanes; ++k)
          for (int64_t i = c; i < c + 2; ++i)
            *to++ = i >= in    ? 0
                    : kFlipped ? w[(i * size + size - 1 - tap) * out + k]
                               : w[(k * size + tap) * in + i];
  return packed;
}

// What a convolution does to x first: nothing, or relu(a * x + b), repeated along a row.
class Prologue {
 public:
  Prologue(const float* scale_shift, int64_t width, int64_t channels)
      : has_scale_shift_(scale_shift),
        size_(width * channels),
        channels_(channels),
        scale_(repeat(scale_shift, channels, scale_shift ? size_ : 0)),
        shift_(repeat(scale_shift ? scale_shift + channels : nullptr, channels,
                      scale_shift ? size_ : 0)) {}

  // values: room for a row in fp32.
  void operator()(const bf16* x, float* values, bf16* row) const {
    if (has_scale_shift_) {
      const float *a = scale_.data(), *b = shift_.data();
#pragma GCC ivdep
      for (int64_t j = 0; j < size_; ++j) values[j] = relu(a[j] * widen(x[j]) + b[j]);
      narrow(values, row, size_);
    } else if (channels_ == 3) {
      for (int64_t i = 0, j = 0; i < size_; i += 3, j += 4) {
        for (int c = 0; c < 3; ++c) row[j + c] = x[i + c];
        row[j + 3] = 0;
      }
    } else {
      std::memcpy(row, x, size_ * sizeof(bf16));
    }
  }

 private:
  bool has_scale_shift_;
  int64_t size_, channels_;
  std::vector<float> scale_, shift_;
};

// Copy an image into the middle of (H + 2, W + 2, depth) zeros, rows made by `make(h, row)`;
// without a border for 1x1 filters. The padding is 0 after the prologue: relu(b) is not 0.
template <class Make>
void fill_padded(bf16* padded, int64_t height, int64_t width, int64_t depth, int64_t border,
                 const Make& make) {
  const int64_t edge = border * depth, row = width * depth + 2 * edge;
  const auto clear = [](bf16* to, int64_t size) { std::memset(to, 0, size * sizeof(bf16)); };
  clear(padded, border * row);
  for (int64_t h = 0; h < height; ++h) {
    bf16* to = padded + (h + border) * row;
    clear(to, edge);
    make(h, to + edge);
    clear(to + row - edge, edge);
  }
  clear(padded + (height + border) * row, border * row);
}

// Filters of taps x taps, 3 or 1, padded to keep the size; stride 1, or 2 of an image of even
// height and width.
struct Shape {
  int64_t images, height, width, in, out, stride, taps;

  int64_t border() const { return taps / 2; }
  int64_t pixels() const { return height * width; }
  int64_t out_height() const { return height / stride; }
  int64_t out_width() const { return width / stride; }
  int64_t out_pixels() const { return out_height() * out_width(); }
  int64_t x_row() const { return (width + 2 * border()) * depth_of(in); }
  int64_t dy_row() const { return (out_width() + 2 * border()) * out; }
  int64_t y_row() const { return out_width() * out; }
  int64_t padded_x() const { return (height + 2 * border()) * x_row(); }
  int64_t padded_dy() const { return (out_height() + 2 * border()) * dy_row(); }
  int64_t dw_size() const { return out * taps * taps * depth_of(in); }
};

}  // namespace fastres

#endif
