// Convolutions with stride 2 and their dx, for the many numbers of channels at which maps shrink.
// A file of its own, so that it compiles beside the others.

#include "conv.h"

#ifdef __AVX512BF16__

namespace fastres {
namespace {

// One row of one phase of dx, for stride 2. A pixel meets only the taps r, s that have its parity,
// so pixels belong to four phases, each a dense convolution. Of 3x3 filters they have 1, 2 or
// 4 taps: flipped tap 1 alone for even rows, taps 2 and 0 of rows p + 1 and p for odd ones. Of 1x1
// filters only even pixels have one. A phase is a type, so that its taps unroll and the sums stay
// in registers between them.
template <int kTaps, int kC, int kPixels, int kVectors, bool kOddRow, bool kOddColumn>
void convolve_phase(const Plane& plane, const Epilogue& epilogue, int64_t h, int64_t k) {
  constexpr int64_t kFilter = kTaps * kTaps * kC * kLanes, kBorder = kTaps / 2;
  constexpr int64_t kFirst[2] = {kTaps / 2, 2};
  constexpr bool kHasTaps = kTaps == 3 || !(kOddRow || kOddColumn);
  const int64_t half = plane.width / 2;
  for (int64_t next = 0; next < half; next += kPixels) {
    const int64_t q = std::min(next, half - kPixels);
    const bf16 *dy = plane.padded + (h / 2 + kBorder) * plane.row + (q + kBorder) * kC,
               *w = plane.w + k / kLanes * kFilter;
    Tile<kPixels, kVectors> tile;
    if constexpr (kHasTaps)
#pragma GCC unroll 2
      for (int i = 0; i <= kOddRow; ++i)
#pragma GCC unroll 2
        for (int j = 0; j <= kOddColumn; ++j) {
          const int64_t tap = (kFirst[kOddRow] - 2 * i) * kTaps + kFirst[kOddColumn] - 2 * j;
          tile.template add<kC, kC>(dy + (kOddRow - i) * plane.row + (kOddColumn - j) * kC,
                                    w + tap * kC * kLanes, kFilter);
        }
    tile.store(plane.out, h * plane.out_row + (2 * q + kOddColumn) * plane.channels + k,
               2 * plane.channels, k, epilogue);
  }
}

// dx of a convolution with stride 2, one padded dy at a time.
template <int kTaps, int kC, int kPixels, int kVectors>
void convolve_phases(const Plane& plane, const Epilogue& epilogue, const Prefetch& prefetch) {
  for (int64_t k = 0; k < plane.channels; k += kVectors * kLanes)
    for (int64_t h = 0; h < plane.height; h += 2) {
      if (k == 0) {
        prefetch(h);
        prefetch(h + 1);
      }
      convolve_phase<kTaps, kC, kPixels, kVectors, false, false>(plane, epilogue, h, k);
      convolve_phase<kTaps, kC, kPixels, kVectors, false, true>(plane, epilogue, h, k);
      convolve_phase<kTaps, kC, kPixels, kVectors, true, false>(plane, epilogue, h + 1, k);
      convolve_phase<kTaps, kC, kPixels, kVectors, true, true>(plane, epilogue, h + 1, k);
    }
}

template <int kTaps>
struct Strided {
  template <int kC, int kPixels, int kVectors>
  static constexpr Convolve run = convolve<kTaps, kC, kPixels, kVectors, 2>;
};

template <int kTaps>
struct StridedDx {
  template <int kC, int kPixels, int kVectors>
  static constexpr Convolve run = convolve_phases<kTaps, kC, kPixels, kVectors>;
};

}  // namespace

Convolve strided(int64_t taps, int64_t depth, int64_t width, int64_t channels) {
  const auto choose =
      taps == 1 ? of_depth<Strided<1>, 16, 32, 64, 128> : of_depth<Strided<3>, 4, 16, 32, 64, 128>;
  return choose(depth, width, channels);
}

Convolve strided_dx(int64_t taps, int64_t depth, int64_t width, int64_t channels) {
  const auto choose = taps == 1 ? of_depth<StridedDx<1>, 16, 32, 64, 128, 256>
                                : of_depth<StridedDx<3>, 16, 32, 64, 128, 256>;
  return choose(depth, width, channels);
}

}  // namespace fastres

#endif
