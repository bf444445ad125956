// Forward kernel of the RoI warp, and what it shares with the backward pass. Feature maps are
// channels_last: neighbouring threads take neighbouring channels, four each where memory allows, and
// the samples of both axes are in shared memory. Tensors that are not channels_last pass through a
// tile in shared memory, so that every access is contiguous. roi_warp_planes.cuh has a kernel of its
// own for most maps in NCHW.
#pragma once

#include "common.cuh"

namespace d2ext {
namespace {

constexpr int kChannels = 32;  // of a tile
constexpr int kBins = 32;      // of a tile
constexpr int kGroups = 2;     // tiles of channels that a block takes, one after the other
constexpr int kPitch = kBins + 1;  // of a channel in a tile; no bank is met twice

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

// Blocks that a multiprocessor shall hold, which bounds their registers: `wanted` where they
// suffice.
template <class T, Kind kKind, int kWidth, int wanted>
constexpr int kResident =
    kWidth > 1 && kKind != Kind::kEdge && sizeof(Accumulate<T>) == 4 ? wanted : 1;

// Values of neighbouring channels, moved by one access.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Channels {
  T value[kWidth];

  static __device__ __forceinline__ Channels load(const T* from) {
    return *reinterpret_cast<const Channels*>(from);
  }
  __device__ __forceinline__ void store(T* to) const {
    *reinterpret_cast<Channels*>(to) = *this;
  }
};

// The cells of one sample, in their channels.
template <class T, int kWidth>
struct Corners {
  Channels<T, kWidth> value[4];

  __device__ __forceinline__ Corners(
      const T* plane, int64_t channels, int width, int y0, int y1, int x0, int x1) {
    const int64_t top = int64_t(y0) * width, low = int64_t(y1) * width;
    value[0] = Channels<T, kWidth>::load(plane + (top + x0) * channels);
    value[1] = Channels<T, kWidth>::load(plane + (top + x1) * channels);
    value[2] = Channels<T, kWidth>::load(plane + (low + x0) * channels);
    value[3] = Channels<T, kWidth>::load(plane + (low + x1) * channels);
  }
  template <class A>
  __device__ __forceinline__ A get(int corner, int channel) const {
    return static_cast<A>(value[corner].value[channel]);
  }
};

// The four cells of a row that the two samples of a pooled bin read; mostly three, each read once.
template <class T, class A, int kWidth>
struct PoolRow {
  using Values = Channels<T, kWidth>;
  Values value[4];

  __device__ __forceinline__ PoolRow(
      const T* row, int64_t channels, const WarpSample<A>& left, const WarpSample<A>& right)
      : value{} {
    if (left.valid()) {
      value[0] = Values::load(row + left.cell0 * channels);
      value[1] = Values::load(row + left.cell1 * channels);
    }
    if (!right.valid()) return;
    if (left.valid() && right.cell0 == left.cell0) {
      value[2] = value[0];
    } else if (left.valid() && right.cell0 == left.cell1) {
      value[2] = value[1];
    } else {
      value[2] = Values::load(row + right.cell0 * channels);
    }
    if (left.valid() && right.cell1 == left.cell1) {
      value[3] = value[1];
    } else {
      value[3] = Values::load(row + right.cell1 * channels);
    }
  }

  // Add what this row gives to the samples `left` and `right` of a row of them.
  __device__ __forceinline__ void add(
      A weight, const WarpSample<A>& left, const WarpSample<A>& right, A (&sum)[2][kWidth]) const {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      sum[0][k] += weight * left.weight0 * static_cast<A>(value[0].value[k]);
      sum[0][k] += weight * left.weight1 * static_cast<A>(value[1].value[k]);
      sum[1][k] += weight * right.weight0 * static_cast<A>(value[2].value[k]);
      sum[1][k] += weight * right.weight1 * static_cast<A>(value[3].value[k]);
    }
  }
};

// Values of one bin; `winner` is the number of the sample that gave it, -1 for none. Of a pooled one,
// whose samples share cells.
template <class T, class A, int kWidth>
__device__ __forceinline__ void pooled_values(
    const T* plane, int64_t channels, int width, const Box<A, Kind::kPool>& box, int p, int q,
    A (&best)[kWidth], int (&winner)[kWidth]) {
  using Row = PoolRow<T, A, kWidth>;
  const WarpSample<A> left = box.x.at(q, 0), right = box.x.at(q, 1);
  const WarpSample<A> top = box.y.at(p, 0), low = box.y.at(p, 1);
  const auto row_at = [&](int row) {
    return Row(plane + int64_t(row) * width * channels, channels, left, right);
  };
  const bool both = top.valid() && low.valid();
  const bool same = both && low.cell0 == top.cell0 && low.cell1 == top.cell1;
  const bool next = both && !same && low.cell0 == top.cell1;
  A sums[2][2][kWidth] = {};
  if (top.valid()) {
    const Row first = row_at(top.cell0);
    first.add(top.weight0, left, right, sums[0]);
    if (same) first.add(low.weight0, left, right, sums[1]);
    const Row second = row_at(top.cell1);
    second.add(top.weight1, left, right, sums[0]);
    if (same || next) second.add(same ? low.weight1 : low.weight0, left, right, sums[1]);
  }
  if (low.valid() && !same) {
    if (!next) row_at(low.cell0).add(low.weight0, left, right, sums[1]);
    row_at(low.cell1).add(low.weight1, left, right, sums[1]);
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    best[k] = sums[0][0][k];
    winner[k] = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      if (!(sums[i / 2][i % 2][k] > best[k])) continue;
      best[k] = sums[i / 2][i % 2][k];
      winner[k] = i;
    }
  }
}

// The same of any number of samples.
template <class T, class A, Kind kKind, int kWidth>
__device__ __forceinline__ void sampled_values(
    const T* plane, int64_t channels, int width, const Box<A, kKind>& box, int p, int q,
    A (&best)[kWidth], int (&winner)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    best[k] = A(0);
    winner[k] = -1;
  }
  const int ny = box.y.count(), nx = box.x.count();
  for (int i = 0; i < ny; ++i) {
    const WarpSample<A> y = box.y.at(p, i);
    for (int j = 0; j < nx; ++j) {
      const WarpSample<A> x = box.x.at(q, j);
      const bool valid = y.valid() && x.valid();
      if (!valid && kKind == Kind::kEdge) continue;
      A value[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) value[k] = A(0);
      if (valid) {
        const Corners<T, kWidth> at(plane, channels, width, y.cell0, y.cell1, x.cell0, x.cell1);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          value[k] = y.weight0 * x.weight0 * at.template get<A>(0, k) +
              y.weight0 * x.weight1 * at.template get<A>(1, k) +
              y.weight1 * x.weight0 * at.template get<A>(2, k) +
              y.weight1 * x.weight1 * at.template get<A>(3, k);
        }
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (winner[k] < 0 || value[k] > best[k]) {
          best[k] = value[k];
          winner[k] = i * nx + j;
        }
      }
    }
  }
}

template <class T, class A, Kind kKind, int kWidth>
__device__ __forceinline__ void bin_values(
    const T* plane, int64_t channels, int width, const Box<A, kKind>& box, int p, int q,
    A (&best)[kWidth], int (&winner)[kWidth]) {
  if constexpr (kKind == Kind::kPool) {
    pooled_values<T, A, kWidth>(plane, channels, width, box, p, q, best, winner);
  } else {
    sampled_values<T, A, kKind, kWidth>(plane, channels, width, box, p, q, best, winner);
  }
}

// What a thread does in a tile: some channels of every kStep-th bin.
template <int kWidth>
struct Place {
  static constexpr int kLanes = kChannels / kWidth, kStep = kThreads / kLanes;
  static constexpr int kCount = kBins / kStep;
  int bin, channel;  // within the tile

  __device__ __forceinline__ Place()
      : bin(threadIdx.x / kLanes), channel(threadIdx.x % kLanes * kWidth) {}
};

// Rows and columns of the bins that a thread has in a tile: divided once for all its channels.
template <int kWidth>
struct TileBins {
  int p[Place<kWidth>::kCount], q[Place<kWidth>::kCount];

  __device__ __forceinline__ TileBins(int first, int out_w) {
#pragma unroll
    for (int i = 0; i < Place<kWidth>::kCount; ++i) {
      const int bin = first + i * Place<kWidth>::kStep;
      p[i] = bin / out_w;
      q[i] = bin - p[i] * out_w;
    }
  }
};

// Between a tile [channel][bin] and a tensor (N, C, bins) at the first channel and bin of the tile.
template <class Move>
__device__ __forceinline__ void for_tile(
    int64_t channels, int bins, int64_t pitch, const Move& move) {
  for (int i = threadIdx.x; i < kChannels * kBins; i += kThreads) {
    const int channel = i / kBins, bin = i % kBins;
    if (channel < channels && bin < bins) move(channel * kPitch + bin, channel * pitch + bin);
  }
}

// Input channels_last; `last`: the output too. A block per RoI and kGroups * kChannels channels.
template <class T, Kind kKind, int kWidth>
__global__ void
__launch_bounds__(kThreads, kResident<T, kKind, kWidth, (kKind == Kind::kPool ? 3 : 4)>)
warp_forward(
    const T* __restrict__ input, const Accumulate<T>* __restrict__ rois, Accumulate<T> scale,
    WarpShape shape, bool last, T* output) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  __shared__ T tile[kChannels * kPitch];
  const int64_t roi = blockIdx.x, all = shape.channels;
  const int64_t begin = int64_t(blockIdx.y) * kGroups * kChannels;
  const int64_t end = min(begin + kGroups * kChannels, all);
  const int bins = shape.out_h * shape.out_w;
  const Box<A, kKind> box = load_box<A, kKind>(
      rois + roi * 5, scale, shape, reinterpret_cast<WarpSample<A>*>(shared));
  const T* const from =
      input + max(box.image, int64_t(0)) * all * shape.height * shape.width;
  const Place<kWidth> place;
  for (int first = 0; first < bins; first += kBins) {
    const TileBins<kWidth> at(first + place.bin, shape.out_w);
    for (int64_t group = begin; group < end; group += kChannels) {
      const int64_t channel = group + place.channel;
#pragma unroll
      for (int i = 0; i < Place<kWidth>::kCount; ++i) {
        const int bin = place.bin + i * Place<kWidth>::kStep;
        if (first + bin >= bins || channel >= end) continue;
        A value[kWidth] = {};
        if (box.image >= 0) {
          int winner[kWidth];
          bin_values<T, A, kKind, kWidth>(
              from + channel, all, shape.width, box, at.p[i], at.q[i], value, winner);
        }
        Channels<T, kWidth> result;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) result.value[k] = static_cast<T>(value[k]);
        if (last) {
          result.store(output + (roi * bins + first + bin) * all + channel);
          continue;
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          tile[(place.channel + k) * kPitch + bin] = result.value[k];
        }
      }
      if (last) continue;
      __syncthreads();
      T* to = output + (roi * all + group) * bins + first;
      for_tile(end - group, bins - first, bins, [&](int in_tile, int64_t in_tensor) {
        to[in_tensor] = tile[in_tile];
      });
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace d2ext
