// A basic residual block of inference, one image at a time:
//
//   out = relu(a2 * conv(relu(a1 * conv(x) + b1)) + b2 + shortcut)
//
// with x itself, its 1x1 projection or nothing as the shortcut. What lies between the convolutions
// stays in the second-level cache, so that only x and out cross memory. Bit for bit what
// `conv_folded` computes layer by layer; letters, shapes and numerics as in conv.cpp.

#include "conv.h"

#ifdef __AVX512BF16__

namespace fastres {
namespace {

// A convolution and its batch norm as scale and shift.
struct Layer {
  Layer(const bf16* w, const float* scale_shift, const Shape& shape)
      : s(shape),
        scale_shift(scale_shift),
        packed(pack<false>(w, s.taps, s.in, s.out)),
        run((s.stride == 1 ? dense : strided)(s.taps, s.in, s.out_width(), s.out)) {}

  // Convolve one image, which lies in rows of x_row numbers, into rows of out_row numbers.
  void operator()(const bf16* x, int64_t x_row, bf16* out, int64_t out_row, const bf16* residual,
                  bool with_relu, const Prefetch& next) const {
    run({x, packed.get(), out, s.out_height(), s.out_width(), s.out, x_row, out_row},
        {scale_shift, s.out, residual, with_relu}, next);
  }

  Shape s;
  const float* scale_shift;
  Buffer<bf16> packed;
  Convolve run;
};

}  // namespace
}  // namespace fastres

using namespace fastres;

extern "C" void block_folded(const bf16* x, const bf16* w1, const float* scale_shift1,
                             const bf16* w2, const float* scale_shift2, const bf16* w_projection,
                             const float* scale_shift_projection, bf16* out, int64_t images,
                             int64_t height, int64_t width, int64_t in, int64_t channels,
                             int64_t stride, int64_t add_input) {
  const Layer first(w1, scale_shift1, {images, height, width, in, channels, stride, 3});
  const Shape &s = first.s, inner{images, s.out_height(), s.out_width(), channels, channels, 1, 3};
  const Layer second(w2, scale_shift2, inner);
  std::unique_ptr<Layer> projection;
  if (w_projection)
    projection.reset(new Layer(w_projection, scale_shift_projection,
                               {images, height, width, in, channels, stride, 1}));
  const int64_t row = width * in, x_row = s.x_row(), inner_row = inner.x_row();
  const int64_t size = inner.pixels() * channels;
#pragma omp parallel
  {
    const auto padded = buffer<bf16>(s.padded_x()), between = buffer<bf16>(inner.padded_x());
    const auto projected = buffer<bf16>(projection ? size : 0);
    // The rows and columns around it stay zero for all images.
    std::memset(between.get(), 0, inner.padded_x() * sizeof(bf16));
#pragma omp for schedule(static)
    for (int64_t n = 0; n < images; ++n) {
      const bf16* image = x + n * height * row;
      const bf16* shortcut = add_input ? image : nullptr;
      fill_padded(padded.get(), height, width, in, 1, [&](int64_t h, bf16* to) {
        std::memcpy(to, image + h * row, row * sizeof(bf16));
      });
      const Prefetch next{{n + 1 < images ? image + height * row : nullptr}, stride * row};
      first(padded.get(), x_row, between.get() + inner_row + channels, inner_row, nullptr, true,
            next);
      if (projection) {
        (*projection)(padded.get() + x_row + in, x_row, projected.get(), inner.y_row(), nullptr,
                      false, {});
        shortcut = projected.get();
      }
      second(between.get(), inner_row, out + n * size, inner.y_row(), shortcut, true, {});
    }
  }
}

#endif
