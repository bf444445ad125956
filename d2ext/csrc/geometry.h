// Sampling and bin rules, shared by the CPU and CUDA kernels so that they cannot disagree.
// The PyTorch implementations in d2ext/ops/reference follow the same order of operations.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define D2EXT_HD __host__ __device__ __forceinline__
#else
#define D2EXT_HD inline
#endif

namespace d2ext {

// Make a value opaque to the compiler. A flag would not do: -ffp-contract=off takes the fused
// operations from the vector loops of the same files too, and a detour over double is optimised away.
// MSVC contracts nothing by itself.
template <class T>
D2EXT_HD void keep_rounded(T& value) {
#if defined(__CUDA_ARCH__) || !defined(__GNUC__)
  static_cast<void>(value);
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+m"(value));
#endif
}

// A product that is rounded before anything is added to it, whatever the compiler may contract.
D2EXT_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  float product = a * b;
  keep_rounded(product);
  return product;
#endif
}
D2EXT_HD double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  double product = a * b;
  keep_rounded(product);
  return product;
#endif
}

template <class T>
D2EXT_HD bool finite(T value) {
  return value - value == T(0);
}

// C's round, without its library call: halves go away from zero.
template <class T>
D2EXT_HD T round_half_away(T value) {
  const T whole = std::trunc(value);
  const T rest = value - whole;
  if (rest >= T(0.5)) return whole + T(1);
  if (rest <= T(-0.5)) return whole - T(1);
  return whole;
}

// Whether a row (image index, x1, y1, x2, y2) can be used; its image index if so, else -1.
template <class T>
D2EXT_HD int64_t roi_image(const T* roi, int64_t batch) {
  for (int i = 0; i < 5; ++i) {
    if (!finite(roi[i])) return -1;
  }
  if (!(roi[0] >= T(0)) || !(roi[0] < static_cast<T>(batch))) return -1;
  return static_cast<int64_t>(roi[0]);
}

// ------------------------------------------------------------------ RoI warp
struct WarpRule {
  bool aligned;
  bool quantize;
  bool zeros;  // border "zeros", else "clamp_half"
  bool edge;   // bin_reduce "edge_max"
};

template <class T>
struct WarpSpan {
  T start;
  T extent;
  int steps;  // edge_max: sub-steps per bin; a bin has steps + 1 samples
  bool turned;  // the box ends before it starts
};

template <class T>
D2EXT_HD WarpSpan<T> warp_span(T low, T high, T scale, int length, int bins, WarpRule rule) {
  T start = rounded_product(low, scale);
  T end = rounded_product(high, scale);
  if (rule.quantize) {
    start = round_half_away(start);
    end = round_half_away(end);
  }
  WarpSpan<T> span;
  span.start = start;
  span.turned = end < start;
  span.extent = span.turned ? T(0) : end - start;
  span.steps = 0;
  if (rule.edge) {
    const T steps = std::ceil(span.extent / static_cast<T>(bins));
    span.steps = steps < static_cast<T>(length) ? static_cast<int>(steps) : length;
  }
  return span;
}

// Seven words of float, an odd number: in a table in a GPU's shared memory neighbours begin in
// different banks.
template <class T>
struct WarpSample {
  int cell0, cell1;  // cell0 = -1: outside of the map
  T weight0, weight1;
  T slope0, slope1;  // derivative of the value by the position
  T part;            // position inside the box, 0..1

  D2EXT_HD bool valid() const { return cell0 >= 0; }
};

// Sample number `sub` of bin `bin`. Points and pooled warps have sub = 0 only.
template <class T>
D2EXT_HD WarpSample<T> warp_sample(
    const WarpSpan<T>& span, int bin, int sub, int length, int bins, WarpRule rule) {
  T place = static_cast<T>(bin);
  if (rule.edge) {
    place += static_cast<T>(sub) / static_cast<T>(span.steps > 1 ? span.steps : 1);
  } else if (rule.aligned) {
    place += T(0.5);
  }
  const T position = span.start + (span.extent * place) / static_cast<T>(bins) -
      (rule.aligned ? T(0.5) : T(0));
  WarpSample<T> sample;
  sample.cell0 = -1;
  sample.cell1 = 0;
  sample.weight0 = sample.weight1 = sample.slope0 = sample.slope1 = T(0);
  sample.part = span.turned ? T(0) : place / static_cast<T>(bins);
  const T last = static_cast<T>(length - 1);
  if (!rule.zeros) {
    if (!(position >= T(-0.5) && position <= static_cast<T>(length) - T(0.5))) return sample;
    if (position < T(0) || position >= last) {
      sample.cell0 = sample.cell1 = position < T(0) ? 0 : length - 1;
      sample.weight0 = T(1);
      return sample;
    }
    const T base = std::floor(position);
    sample.cell0 = static_cast<int>(base);
    sample.cell1 = sample.cell0 + 1;
    sample.weight1 = position - base;
    sample.weight0 = T(1) - sample.weight1;
    sample.slope0 = T(-1);
    sample.slope1 = T(1);
    return sample;
  }
  if (!(position > T(-1) && position < static_cast<T>(length))) return sample;
  const T base = std::floor(position);
  const int cell = static_cast<int>(base);
  const T frac = position - base;
  if (cell >= 0) {
    sample.cell0 = cell;
    sample.weight0 = T(1) - frac;
    sample.slope0 = T(-1);
  } else {
    sample.cell0 = 0;
  }
  if (cell + 1 < length) {
    sample.cell1 = cell + 1;
    sample.weight1 = frac;
    sample.slope1 = T(1);
  } else {
    sample.cell1 = length - 1;
  }
  return sample;
}

// ------------------------------------------------------------------ position-sensitive bins
struct PsRule {
  bool inclusive;
};

struct CellRange {
  int first, last;  // half-open, empty when equal
};

// Always float32: float64 would give some boxes other bins than the release.
struct PsSpan {
  float start;
  float bin;
};

D2EXT_HD PsSpan ps_span(float low, float high, float scale, int out_size, PsRule rule) {
  if (rule.inclusive) {
    low = round_half_away(low);
    high = round_half_away(high) + 1.0f;
  }
  const float start = rounded_product(low, scale);
  const float extent = rounded_product(high, scale) - start;
  PsSpan span;
  span.start = start;
  span.bin = (extent > 0.1f ? extent : 0.1f) / static_cast<float>(out_size);
  return span;
}

D2EXT_HD int clamp_cell(float value, int limit) {
  if (!(value > 0.0f)) return 0;
  return value < static_cast<float>(limit) ? static_cast<int>(value) : limit;
}

D2EXT_HD CellRange ps_bin(PsSpan span, int position, int length) {
  CellRange range;
  const float place = static_cast<float>(position);
  const float low = std::floor(rounded_product(place, span.bin) + span.start);
  const float high = std::ceil(rounded_product(place + 1.0f, span.bin) + span.start);
  range.first = clamp_cell(low, length);
  range.last = clamp_cell(high, length);
  if (range.last < range.first) range.last = range.first;
  return range;
}

// ------------------------------------------------------------------ RoI align, half-pixel aligned
// One axis of a box that is cut into `bins` bins.
template <class T>
struct AlignSpan {
  T start, bin;
  int count;  // samples per bin
};

// sampling <= 0: one sample per cell or less. A box that ends before it starts then has none.
template <class T>
D2EXT_HD AlignSpan<T> align_span(T low, T high, T scale, int bins, int sampling) {
  AlignSpan<T> span;
  span.start = rounded_product(low, scale) - T(0.5);
  const T extent = (rounded_product(high, scale) - T(0.5)) - span.start;
  span.bin = extent / static_cast<T>(bins);
  const T count = std::ceil(span.bin), limit = static_cast<T>(1 << 30);
  if (sampling > 0) {
    span.count = sampling;
  } else {
    span.count = count < limit ? (count > T(0) ? static_cast<int>(count) : 0) : 1 << 30;
  }
  if (!finite(extent)) span.count = 0;
  return span;
}

// Samples of a bin that may lie in the map; the others need not be looked at. Boxes may be huge.
template <class T>
D2EXT_HD CellRange align_range(const AlignSpan<T>& span, int bin, int length) {
  CellRange range = {0, span.count};
  const double step = static_cast<double>(span.bin) / (span.count > 0 ? span.count : 1);
  if (step == 0.0) return range;
  const double base = static_cast<double>(span.start) + static_cast<double>(span.bin) * bin;
  const double a = (-1.0 - base) / step, b = (length - base) / step;
  const double low = (a < b ? a : b) - 3.0, high = (a < b ? b : a) + 3.0;
  if (low > 0.0) range.first = low < span.count ? static_cast<int>(low) : span.count;
  if (high < span.count) range.last = high > 0.0 ? static_cast<int>(high) : 0;
  if (range.last < range.first) range.last = range.first;
  return range;
}

template <class T>
struct AlignSample {
  int cell0, cell1;
  T weight0, weight1;
  bool valid;
};

template <class T>
D2EXT_HD AlignSample<T> align_sample(const AlignSpan<T>& span, int bin, int sub, int length) {
  T position = span.start + rounded_product(static_cast<T>(bin), span.bin) +
      rounded_product(static_cast<T>(sub) + T(0.5), span.bin) / static_cast<T>(span.count);
  AlignSample<T> sample = {0, 0, T(0), T(0), false};
  sample.valid = position >= T(-1) && position <= static_cast<T>(length);
  if (!sample.valid) return sample;
  if (position < T(0)) position = T(0);
  const int cell = static_cast<int>(position), last = length - 1;
  sample.cell0 = cell < last ? cell : last;
  sample.cell1 = cell < last ? cell + 1 : last;
  sample.weight1 = cell < last ? position - static_cast<T>(cell) : T(0);
  sample.weight0 = T(1) - sample.weight1;
  return sample;
}

// ------------------------------------------------------------------ masks
template <class T>
struct Lerp {
  int cell0, cell1;
  T weight;  // of cell1
  bool valid;
};

// Position clamped to 0..length-1.
template <class T>
D2EXT_HD Lerp<T> lerp_clamped(T position, int length) {
  Lerp<T> lerp;
  lerp.valid = true;
  if (!(position > T(0))) position = T(0);
  if (position > static_cast<T>(length - 1)) position = static_cast<T>(length - 1);
  const T base = std::floor(position);
  lerp.cell0 = static_cast<int>(base);
  lerp.cell1 = lerp.cell0 + 1 < length ? lerp.cell0 + 1 : length - 1;
  lerp.weight = position - base;
  return lerp;
}

// Corner-anchored resize from `length` to `out` cells.
template <class T>
D2EXT_HD Lerp<T> resize_sample(int index, int length, int out) {
  const T position =
      (static_cast<T>(index) * static_cast<T>(length)) / static_cast<T>(out);
  Lerp<T> lerp = lerp_clamped(position, length);
  lerp.valid = position <= static_cast<T>(length) - T(0.5);
  return lerp;
}

// Mask coordinate of the centre of a pixel.
template <class T>
D2EXT_HD T paste_position(int pixel, T low, T high, int size) {
  return (static_cast<T>(pixel) + T(0.5) - low) / (high - low) * static_cast<T>(size) - T(0.5);
}

enum class VoteMode { kFcis, kMnc, kCrop };

template <class T>
D2EXT_HD T vote_position(int pixel, T low, T high, int size, VoteMode mode) {
  const T span = high - low + T(1);
  const T offset = static_cast<T>(pixel) - low;
  if (mode == VoteMode::kMnc) return offset * static_cast<T>(size) / span;
  return (offset + T(0.5)) * static_cast<T>(size) / span - T(0.5);
}

// Pixels low <= x <= high of an image; low and high finite.
template <class T>
D2EXT_HD CellRange vote_span(T low, T high, int image) {
  CellRange range;
  range.first = range.last = 0;
  const T first = std::ceil(low), last = std::floor(high);
  if (!(first < static_cast<T>(image)) || !(last >= T(0)) || last < first) return range;
  range.first = first > T(0) ? static_cast<int>(first) : 0;
  range.last = last < static_cast<T>(image - 1) ? static_cast<int>(last) + 1 : image;
  return range;
}

// Where cell `index` of the voted mask samples the image, between inclusive first and last.
template <class T>
D2EXT_HD T recrop_position(int index, int first, int last, int size, VoteMode mode) {
  const T span = static_cast<T>(last - first + 1);
  if (mode == VoteMode::kMnc) {
    return static_cast<T>(first) + static_cast<T>(index) * span / static_cast<T>(size);
  }
  const T inside = (static_cast<T>(index) + T(0.5)) * span / static_cast<T>(size) - T(0.5);
  return mode == VoteMode::kCrop ? inside : inside + static_cast<T>(first);
}

}  // namespace d2ext
