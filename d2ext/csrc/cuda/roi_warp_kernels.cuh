// Kernels of the RoI warp. Forward: a block takes one RoI and 32 channels, with the samples of both axes
// in shared memory. Backward works on channels_last data: a warp takes one bin and 32 channels, so that
// its loads and atomic additions are contiguous; box gradients are reduced in a fixed order.
#pragma once

#include "common.cuh"

namespace d2ext {
namespace {

constexpr int kChannels = 32;
constexpr int kSegments = 32;  // deterministic backward: RoIs are split into this many groups

enum class Kind { kPoint, kPool, kEdge };

struct WarpShape {
  int64_t batch, channels, count;
  int height, width, out_h, out_w;
  WarpRule rule;
};

// Samples of one RoI along one axis: a table in shared memory, or for edge_max the rule itself.
template <class A, Kind kKind>
struct Axis {
  WarpSpan<A> span;
  const WarpSample<A>* table;
  int length, bins;
  WarpRule rule;

  // samples per bin
  __device__ __forceinline__ int count() const {
    if (kKind == Kind::kPoint) return 1;
    return kKind == Kind::kPool ? 2 : span.steps + 1;
  }
  __device__ __forceinline__ WarpSample<A> at(int bin, int sub) const {
    if (kKind == Kind::kEdge) return warp_sample(span, bin, sub, length, bins, rule);
    return table[kKind == Kind::kPool ? bin * 2 + sub : bin];
  }
};

template <class A, Kind kKind>
struct Box {
  Axis<A, kKind> x, y;
  int64_t image;
};

template <Kind kKind>
constexpr int kPerBin = kKind == Kind::kPool ? 2 : 1;

// Fill the tables; all threads of the block call this. image < 0: the row takes no part.
template <class A, Kind kKind>
__device__ Box<A, kKind> load_box(
    const A* roi, A scale, const WarpShape& shape, WarpSample<A>* tables) {
  Box<A, kKind> box;
  box.image = roi_image(roi, shape.batch);
  if (box.image < 0) return box;
  const int bins_x = shape.out_w * kPerBin<kKind>, bins_y = shape.out_h * kPerBin<kKind>;
  box.x = {warp_span(roi[1], roi[3], scale, shape.width, bins_x, shape.rule), tables,
           shape.width, bins_x, shape.rule};
  box.y = {warp_span(roi[2], roi[4], scale, shape.height, bins_y, shape.rule), tables + bins_x,
           shape.height, bins_y, shape.rule};
  if (kKind != Kind::kEdge) {
    for (int i = threadIdx.x; i < bins_x + bins_y; i += blockDim.x) {
      const bool along_x = i < bins_x;
      const Axis<A, kKind>& axis = along_x ? box.x : box.y;
      tables[i] = warp_sample(
          axis.span, along_x ? i : i - bins_x, 0, axis.length, axis.bins, shape.rule);
    }
    __syncthreads();
  }
  return box;
}

template <class T, class A>
__device__ __forceinline__ A read_sample(
    const T* plane, int64_t cell, int width, const WarpSample<A>& y, const WarpSample<A>& x) {
  const T* top = plane + int64_t(y.cell0) * width * cell;
  const T* low = plane + int64_t(y.cell1) * width * cell;
  return y.weight0 * x.weight0 * static_cast<A>(top[x.cell0 * cell]) +
      y.weight0 * x.weight1 * static_cast<A>(top[x.cell1 * cell]) +
      y.weight1 * x.weight0 * static_cast<A>(low[x.cell0 * cell]) +
      y.weight1 * x.weight1 * static_cast<A>(low[x.cell1 * cell]);
}

// Value of one bin; `winner` is the number of the sample that gave it, -1 for none.
template <class T, class A, Kind kKind>
__device__ __forceinline__ A bin_value(
    const T* plane, int64_t cell, int width, const Box<A, kKind>& box, int p, int q, int& winner) {
  winner = -1;
  A best = A(0);
  const int ny = box.y.count(), nx = box.x.count();
  for (int i = 0; i < ny; ++i) {
    const WarpSample<A> y = box.y.at(p, i);
    for (int j = 0; j < nx; ++j) {
      const WarpSample<A> x = box.x.at(q, j);
      const bool valid = y.valid && x.valid;
      if (!valid && kKind == Kind::kEdge) continue;
      const A value = valid ? read_sample(plane, cell, width, y, x) : A(0);
      if (winner < 0 || value > best) {
        best = value;
        winner = i * nx + j;
      }
    }
  }
  return best;
}

// kLast: channels_last input and output.
template <class T, Kind kKind, bool kLast>
__global__ void __launch_bounds__(kThreads, 1) warp_forward(
    const T* input, const Accumulate<T>* rois, Accumulate<T> scale, WarpShape shape, T* output) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  const int64_t roi = blockIdx.x;
  const int64_t channel0 = int64_t(blockIdx.y) * kChannels;
  const int channels = static_cast<int>(min(int64_t(kChannels), shape.channels - channel0));
  const int bins = shape.out_h * shape.out_w;
  const int64_t cells = int64_t(shape.height) * shape.width;
  const Box<A, kKind> box = load_box<A, kKind>(
      rois + roi * 5, scale, shape, reinterpret_cast<WarpSample<A>*>(shared));
  // both at the first channel of the block
  T* const to = output + (roi * shape.channels * bins + channel0 * (kLast ? 1 : bins));
  const T* const from = input + max(box.image, int64_t(0)) * shape.channels * cells +
      channel0 * (kLast ? 1 : cells);
  for (int i = threadIdx.x; i < bins * channels; i += blockDim.x) {
    const int bin = kLast ? i / channels : i % bins;
    const int channel = kLast ? i % channels : i / bins;
    A value = A(0);
    if (box.image >= 0) {
      const T* plane = from + (kLast ? channel : channel * cells);
      int winner;
      value = bin_value<T, A, kKind>(
          plane, kLast ? shape.channels : 1, shape.width, box, bin / shape.out_w,
          bin % shape.out_w, winner);
    }
    to[kLast ? bin * shape.channels + channel : channel * bins + bin] = static_cast<T>(value);
  }
}

template <class A>
struct BoxSums {
  A x1, y1, x2, y2;
};

// One bin and channel of the backward pass, channels_last. `add` takes (offset of a cell, value).
template <class T, class A, Kind kKind, class Add>
__device__ __forceinline__ void bin_backward(
    const T* plane, const WarpShape& shape, const Box<A, kKind>& box, int p, int q, A scale,
    A grad, bool need_rois, BoxSums<A>& sums, const Add& add) {
  int winner = 0;
  if (kKind != Kind::kPoint) {
    bin_value<T, A, kKind>(plane, shape.channels, shape.width, box, p, q, winner);
    if (winner < 0) return;
  }
  const int nx = box.x.count();
  const WarpSample<A> y = box.y.at(p, winner / nx);
  const WarpSample<A> x = box.x.at(q, winner % nx);
  if (!y.valid || !x.valid) return;
  const int64_t top = int64_t(y.cell0) * shape.width, low = int64_t(y.cell1) * shape.width;
  const int64_t cells[4] = {
      (top + x.cell0) * shape.channels, (top + x.cell1) * shape.channels,
      (low + x.cell0) * shape.channels, (low + x.cell1) * shape.channels};
  add(cells[0], grad * y.weight0 * x.weight0);
  add(cells[1], grad * y.weight0 * x.weight1);
  add(cells[2], grad * y.weight1 * x.weight0);
  add(cells[3], grad * y.weight1 * x.weight1);
  if (!need_rois) return;
  const A v00 = static_cast<A>(plane[cells[0]]), v01 = static_cast<A>(plane[cells[1]]);
  const A v10 = static_cast<A>(plane[cells[2]]), v11 = static_cast<A>(plane[cells[3]]);
  const A by_x = grad * scale *
      (y.weight0 * (x.slope0 * v00 + x.slope1 * v01) + y.weight1 * (x.slope0 * v10 + x.slope1 * v11));
  const A by_y = grad * scale *
      (x.weight0 * (y.slope0 * v00 + y.slope1 * v10) + x.weight1 * (y.slope0 * v01 + y.slope1 * v11));
  sums.x1 += by_x * (A(1) - x.part);
  sums.x2 += by_x * x.part;
  sums.y1 += by_y * (A(1) - y.part);
  sums.y2 += by_y * y.part;
}

// Everything channels_last. input_grad may be null; rois_partial (channel blocks, N, 4) too.
template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads, 1) warp_backward(
    const T* grad, const T* input, const Accumulate<T>* rois, Accumulate<T> scale,
    WarpShape shape, Accumulate<T>* input_grad, Accumulate<T>* rois_partial) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  __shared__ A reduce[32];
  const int64_t roi = blockIdx.x;
  const int64_t channel0 = int64_t(blockIdx.y) * kChannels;
  const int channels = static_cast<int>(min(int64_t(kChannels), shape.channels - channel0));
  const int bins = shape.out_h * shape.out_w;
  const int64_t cells = int64_t(shape.height) * shape.width;
  const Box<A, kKind> box = load_box<A, kKind>(
      rois + roi * 5, scale, shape, reinterpret_cast<WarpSample<A>*>(shared));
  BoxSums<A> sums = {A(0), A(0), A(0), A(0)};
  if (box.image >= 0) {
    const int64_t base = box.image * cells * shape.channels;
    for (int i = threadIdx.x; i < bins * channels; i += blockDim.x) {
      const int bin = i / channels;
      const int64_t channel = channel0 + i % channels;
      const A upstream = static_cast<A>(grad[(roi * bins + bin) * shape.channels + channel]);
      A* to = input_grad == nullptr ? nullptr : input_grad + base + channel;
      bin_backward<T, A, kKind>(
          input + base + channel, shape, box, bin / shape.out_w, bin % shape.out_w, scale,
          upstream, rois_partial != nullptr, sums, [to](int64_t cell, A value) {
            if (to != nullptr) atomicAdd(to + cell, value);
          });
    }
  }
  if (rois_partial == nullptr) return;
  A* row = rois_partial + (int64_t(blockIdx.y) * shape.count + roi) * 4;
  const A x1 = block_sum(sums.x1, reduce), y1 = block_sum(sums.y1, reduce);
  const A x2 = block_sum(sums.x2, reduce), y2 = block_sum(sums.y2, reduce);
  if (threadIdx.x == 0) row[0] = x1, row[1] = y1, row[2] = x2, row[3] = y2;
}

// Feature gradient without atomics: a warp owns 32 channels of a private map and takes the RoIs of its
// segment in order. partial is (segments, B, H, W, C).
template <class T, Kind kKind>
__global__ void __launch_bounds__(kChannels, 1) warp_backward_ordered(
    const T* grad, const T* input, const Accumulate<T>* rois, Accumulate<T> scale,
    WarpShape shape, int segments, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  const int64_t channel = int64_t(blockIdx.y) * kChannels + threadIdx.x;
  const int segment = blockIdx.x, bins = shape.out_h * shape.out_w;
  const int64_t cells = int64_t(shape.height) * shape.width;
  const int64_t first = shape.count * segment / segments;
  const int64_t last = shape.count * (segment + 1) / segments;
  for (int64_t roi = first; roi < last; ++roi) {
    __syncthreads();  // the tables of the last RoI are no longer read
    const Box<A, kKind> box = load_box<A, kKind>(
        rois + roi * 5, scale, shape, reinterpret_cast<WarpSample<A>*>(shared));
    if (box.image < 0 || channel >= shape.channels) continue;
    const int64_t base = box.image * cells * shape.channels + channel;
    A* to = partial + segment * shape.batch * cells * shape.channels + base;
    BoxSums<A> unused = {A(0), A(0), A(0), A(0)};
    for (int bin = 0; bin < bins; ++bin) {
      const A upstream = static_cast<A>(grad[(roi * bins + bin) * shape.channels + channel]);
      bin_backward<T, A, kKind>(
          input + base, shape, box, bin / shape.out_w, bin % shape.out_w, scale, upstream, false,
          unused, [to](int64_t cell, A value) { to[cell] += value; });
    }
  }
}

template <class A>
__global__ void sum_segments(const A* partial, int segments, int64_t size, A* total) {
  D2EXT_GRID_STRIDE(i, size) {
    A sum = A(0);
    for (int segment = 0; segment < segments; ++segment) sum += partial[segment * size + i];
    total[i] = sum;
  }
}

template <class A>
__global__ void sum_boxes(const A* partial, int64_t blocks, int64_t count, A* rois_grad) {
  D2EXT_GRID_STRIDE(i, count * 5) {
    A sum = A(0);
    if (i % 5 != 0) {
      const int64_t at = i / 5 * 4 + i % 5 - 1;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[block * count * 4 + at];
    }
    rois_grad[i] = sum;
  }
}

}  // namespace
}  // namespace d2ext
