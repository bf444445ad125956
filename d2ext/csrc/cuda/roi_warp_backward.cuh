// Backward kernels of the RoI warp. Gradients of the features are gathered: every cell of the map
// adds up the bins that read it, box by box in order, so the result does not depend on timing. For
// that, boxes are prepared once: which bins read which rows and columns, with which weights, and
// which sample won where a maximum is taken.
#pragma once

#include "roi_warp_kernels.cuh"

namespace d2ext {
namespace {

constexpr int kTileWidth = 4;  // cells of the map along x that a block gathers

// A sample along one axis; an invalid one has no cells (-1).
template <class A>
struct alignas(16) AxisSample {
  A weight0, weight1;
  int cell0, cell1;
};

// Bins first <= bin < last read a row or column of the map.
struct BinRange {
  uint8_t first, last;
};
static_assert(kMaxWarpSize <= 255);

// Cells that a box reads, inclusive; image < 0: none.
struct Reach {
  int image, y1, y2, x1, x2;
};

// Prepared boxes: samples (N, rows then columns), ranges (N, height then width), reach (N). The
// samples are not used for edge_max.
template <class A>
struct Plan {
  AxisSample<A>* samples;
  BinRange* ranges;
  Reach* reach;
};

// A block per RoI.
template <class A, Kind kKind>
__global__ void __launch_bounds__(kThreads, 1) warp_plan(
    const A* __restrict__ rois, A scale, WarpShape shape, Plan<A> plan) {
  __shared__ int low[2 * kMaxWarpSize], high[2 * kMaxWarpSize];
  __shared__ int reach[4];  // y1, y2, x1, x2
  constexpr int kPer = kPerBin<kKind>;
  const int64_t roi = blockIdx.x;
  const int bins = shape.out_h + shape.out_w, cells = shape.height + shape.width;
  const A* box = rois + roi * 5;
  const int64_t image = roi_image(box, shape.batch);
  if (image < 0) {
    if (threadIdx.x == 0) plan.reach[roi] = {-1, 0, -1, 0, -1};
    return;
  }
  if (threadIdx.x < 4) {
    reach[threadIdx.x] = threadIdx.x % 2 ? -1 : max(shape.height, shape.width);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) {
    const bool along_y = i < shape.out_h;
    const int bin = along_y ? i : i - shape.out_h, length = along_y ? shape.height : shape.width;
    const int all = kPer * (along_y ? shape.out_h : shape.out_w);
    const WarpSpan<A> span =
        warp_span(box[along_y ? 2 : 1], box[along_y ? 4 : 3], scale, length, all, shape.rule);
    const int count = kKind == Kind::kEdge ? span.steps + 1 : kPer;
    int first = length, last = -1;
    for (int sub = 0; sub < count; ++sub) {
      const WarpSample<A> sample = kKind == Kind::kEdge
          ? warp_sample(span, bin, sub, length, all, shape.rule)
          : warp_sample(span, bin * kPer + sub, 0, length, all, shape.rule);
      if (sample.valid()) {
        first = min(first, sample.cell0);
        last = max(last, sample.cell1);
      }
      if (kKind != Kind::kEdge) {
        plan.samples[(roi * bins + i) * kPer + sub] = {
            sample.weight0, sample.weight1, sample.cell0, sample.valid() ? sample.cell1 : -1};
      }
    }
    low[i] = first;
    high[i] = last;
    atomicMin(reach + (along_y ? 0 : 2), first);
    atomicMax(reach + (along_y ? 1 : 3), last);
  }
  __syncthreads();
  // positions rise with the bins: those that read a cell follow each other
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    const bool along_y = i < shape.height;
    const int cell = along_y ? i : i - shape.height, begin = along_y ? 0 : shape.out_h;
    const int count = along_y ? shape.out_h : shape.out_w;
    int first = count, last = 0;
    for (int bin = 0; bin < count; ++bin) {
      if (low[begin + bin] <= cell && cell <= high[begin + bin]) {
        first = min(first, bin);
        last = bin + 1;
      }
    }
    plan.ranges[roi * cells + i] = {static_cast<uint8_t>(first), static_cast<uint8_t>(last)};
  }
  if (threadIdx.x == 0) {
    plan.reach[roi] = {static_cast<int>(image), reach[0], reach[1], reach[2], reach[3]};
  }
}

template <Kind kKind>
using Winner = std::conditional_t<kKind == Kind::kEdge, int, uint8_t>;

template <class A>
struct BoxSums {
  A x1, y1, x2, y2;
};

// How the value of a sample moves with the box, times its gradient.
template <class A>
__device__ __forceinline__ void add_box_gradient(
    const WarpSample<A>& y, const WarpSample<A>& x, A v00, A v01, A v10, A v11, A grad,
    BoxSums<A>& sums) {
  const A by_x = grad *
      (y.weight0 * (x.slope0 * v00 + x.slope1 * v01) +
       y.weight1 * (x.slope0 * v10 + x.slope1 * v11));
  const A by_y = grad *
      (x.weight0 * (y.slope0 * v00 + y.slope1 * v10) +
       x.weight1 * (y.slope0 * v01 + y.slope1 * v11));
  sums.x1 += by_x * (A(1) - x.part);
  sums.x2 += by_x * x.part;
  sums.y1 += by_y * (A(1) - y.part);
  sums.y2 += by_y * y.part;
}

// One bin and its channels.
template <class T, class A, Kind kKind, int kWidth>
__device__ __forceinline__ void add_box_gradients(
    const T* plane, const WarpShape& shape, const Box<A, kKind>& box, int p, int q, A scale,
    const Channels<T, kWidth>& grad, const int (&winner)[kWidth], BoxSums<A>& sums) {
  if (kKind == Kind::kPoint) {  // of the same sample for all channels
    const WarpSample<A> y = box.y.at(p, 0), x = box.x.at(q, 0);
    if (!y.valid() || !x.valid()) return;
    const Corners<T, kWidth> at(
        plane, shape.channels, shape.width, y.cell0, y.cell1, x.cell0, x.cell1);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      add_box_gradient(
          y, x, at.template get<A>(0, k), at.template get<A>(1, k), at.template get<A>(2, k),
          at.template get<A>(3, k), static_cast<A>(grad.value[k]) * scale, sums);
    }
    return;
  }
  const int nx = box.x.count();
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (winner[k] < 0) continue;
    const WarpSample<A> y = box.y.at(p, winner[k] / nx), x = box.x.at(q, winner[k] % nx);
    if (!y.valid() || !x.valid()) continue;
    const Corners<T, 1> at(
        plane + k, shape.channels, shape.width, y.cell0, y.cell1, x.cell0, x.cell1);
    add_box_gradient(
        y, x, at.template get<A>(0, 0), at.template get<A>(1, 0), at.template get<A>(2, 0),
        at.template get<A>(3, 0), static_cast<A>(grad.value[k]) * scale, sums);
  }
}

// What is known box by box. Null pointers are left out: grad_last the gradient in channels_last,
// winners (N, bins, C) the numbers of samples, partial (channel blocks, N, 4) the boxes' gradients.
// `last`: the gradient comes in channels_last.
template <class T, Kind kKind, int kWidth>
__global__ void
__launch_bounds__(kThreads, kResident<T, kKind, kWidth, (kKind == Kind::kPool ? 2 : 3)>) warp_boxes(
    const T* __restrict__ grad, const T* __restrict__ input,
    const Accumulate<T>* __restrict__ rois, Accumulate<T> scale, WarpShape shape, bool last,
    T* grad_last, Winner<kKind>* winners, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  __shared__ T tile[kChannels * kPitch];
  __shared__ A reduce[32];
  const int64_t roi = blockIdx.x, all = shape.channels;
  const int64_t begin = int64_t(blockIdx.y) * kGroups * kChannels;
  const int64_t end = min(begin + kGroups * kChannels, all);
  const int bins = shape.out_h * shape.out_w;
  const Box<A, kKind> box = load_box<A, kKind>(
      rois + roi * 5, scale, shape, reinterpret_cast<WarpSample<A>*>(shared));
  BoxSums<A> sums = {A(0), A(0), A(0), A(0)};
  const Place<kWidth> place;
  for (int first = 0; first < bins && box.image >= 0; first += kBins) {
    const TileBins<kWidth> at(first + place.bin, shape.out_w);
    for (int64_t group = begin; group < end; group += kChannels) {
      if (!last) {
        __syncthreads();
        const T* from = grad + (roi * all + group) * bins + first;
        for_tile(end - group, bins - first, bins, [&](int in_tile, int64_t in_tensor) {
          tile[in_tile] = from[in_tensor];
        });
        __syncthreads();
      }
      const int64_t channel = group + place.channel;
      const T* plane = input + box.image * all * shape.height * shape.width + channel;
#pragma unroll
      for (int i = 0; i < Place<kWidth>::kCount; ++i) {
        const int bin = place.bin + i * Place<kWidth>::kStep;
        if (first + bin >= bins || channel >= end) continue;
        const int64_t to = (roi * bins + first + bin) * all + channel;
        Channels<T, kWidth> upstream;
        if (last) {
          upstream = Channels<T, kWidth>::load(grad + to);
        } else {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            upstream.value[k] = tile[(place.channel + k) * kPitch + bin];
          }
        }
        if (grad_last != nullptr) upstream.store(grad_last + to);
        int winner[kWidth] = {};
        if (kKind != Kind::kPoint) {
          A unused[kWidth];
          bin_values<T, A, kKind, kWidth>(
              plane, all, shape.width, box, at.p[i], at.q[i], unused, winner);
          if (winners != nullptr) {
            Channels<Winner<kKind>, kWidth> kept;
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
              kept.value[k] = static_cast<Winner<kKind>>(winner[k]);
            }
            kept.store(winners + to);
          }
        }
        if (partial == nullptr) continue;
        add_box_gradients<T, A, kKind, kWidth>(
            plane, shape, box, at.p[i], at.q[i], scale, upstream, winner, sums);
      }
    }
  }
  if (partial == nullptr) return;
  A* row = partial + (int64_t(blockIdx.y) * shape.count + roi) * 4;
  const A x1 = block_sum(sums.x1, reduce), y1 = block_sum(sums.y1, reduce);
  const A x2 = block_sum(sums.x2, reduce), y2 = block_sum(sums.y2, reduce);
  if (threadIdx.x == 0) row[0] = x1, row[1] = y1, row[2] = x2, row[3] = y2;
}

template <class A>
__device__ __forceinline__ A weight_at(const AxisSample<A>& sample, int cell) {
  return (sample.cell0 == cell ? sample.weight0 : A(0)) +
      (sample.cell1 == cell ? sample.weight1 : A(0));
}
template <class A>
__device__ __forceinline__ A weight_at(const WarpSample<A>& sample, int cell) {
  if (!sample.valid()) return A(0);
  return (sample.cell0 == cell ? sample.weight0 : A(0)) +
      (sample.cell1 == cell ? sample.weight1 : A(0));
}

// Threads of a block of warp_gather: channels, then cells of a tile of the map.
template <int kWidth>
struct GatherTile {
  static constexpr int kLanes = kWidth > 1 ? 16 : 32, kChannels = kLanes * kWidth;
  static constexpr int kHeight = kThreads / kLanes / kTileWidth;
};

template <class T>
struct Gather {
  const T* grad;  // (N, bins, C)
  const Accumulate<T>* rois;
  Accumulate<T> scale;
  WarpShape shape;
  Plan<Accumulate<T>> plan;
};

// What one box adds to a cell of the map.
template <class T, Kind kKind, int kWidth>
__device__ __forceinline__ void add_roi(
    const Gather<T>& in, const Winner<kKind>* winners, int64_t roi, int y, int x, int64_t channel,
    Accumulate<T> (&sum)[kWidth]) {
  using A = Accumulate<T>;
  constexpr int kPer = kPerBin<kKind>;
  const WarpShape& shape = in.shape;
  const BinRange* ranges = in.plan.ranges + roi * (shape.height + shape.width);
  const BinRange rows = ranges[y], columns = ranges[shape.height + x];
  if (rows.first >= rows.last || columns.first >= columns.last) return;
  const AxisSample<A>* ys = in.plan.samples + roi * (shape.out_h + shape.out_w) * kPer;
  const AxisSample<A>* xs = ys + shape.out_h * kPer;
  WarpSpan<A> span_y, span_x;
  if (kKind == Kind::kEdge) {
    const A* box = in.rois + roi * 5;
    span_y = warp_span(box[2], box[4], in.scale, shape.height, shape.out_h, shape.rule);
    span_x = warp_span(box[1], box[3], in.scale, shape.width, shape.out_w, shape.rule);
  }
  for (int p = rows.first; p < rows.last; ++p) {
    const int64_t line = (roi * shape.out_h + p) * shape.out_w;
    A row[kPer];
    if constexpr (kKind != Kind::kEdge) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) row[i] = weight_at(ys[p * kPer + i], y);
    }
    for (int q = columns.first; q < columns.last; ++q) {
      const int64_t at = (line + q) * shape.channels + channel;
      const Channels<T, kWidth> grad = Channels<T, kWidth>::load(in.grad + at);
      if constexpr (kKind == Kind::kPoint) {
        const A weight = row[0] * weight_at(xs[q], x);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum[k] += static_cast<A>(grad.value[k]) * weight;
      } else {
        const auto won = Channels<Winner<kKind>, kWidth>::load(winners + at);
        A left(0), right(0);
        if constexpr (kKind == Kind::kPool) {
          left = weight_at(xs[q * kPer], x);
          right = weight_at(xs[q * kPer + kPer - 1], x);
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const int number = static_cast<int>(won.value[k]);
          A weight(0);
          if constexpr (kKind == Kind::kPool) {
            weight = (number & 2 ? row[kPer - 1] : row[0]) * (number & 1 ? right : left);
          } else if (number >= 0) {
            const int nx = span_x.steps + 1;
            const auto v =
                warp_sample(span_y, p, number / nx, shape.height, shape.out_h, shape.rule);
            const auto u =
                warp_sample(span_x, q, number % nx, shape.width, shape.out_w, shape.rule);
            weight = weight_at(v, y) * weight_at(u, x);
          }
          if (weight != A(0)) sum[k] += static_cast<A>(grad.value[k]) * weight;
        }
      }
    }
  }
}

// The gradient of the features, channels_last: a block per tile of cells and its channels.
template <class T, Kind kKind, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident<T, kKind, kWidth, 4>) warp_gather(
    Gather<T> in, const Winner<kKind>* __restrict__ winners, T* input_grad) {
  using A = Accumulate<T>;
  using Tile = GatherTile<kWidth>;
  __shared__ unsigned met[kThreads / 32];  // a bit per box of a batch that reads this tile
  const WarpShape& shape = in.shape;
  const int across = (shape.width + kTileWidth - 1) / kTileWidth;
  const int down = (shape.height + Tile::kHeight - 1) / Tile::kHeight;
  const int number = blockIdx.x % (across * down), image = blockIdx.x / (across * down);
  const int y0 = number / across * Tile::kHeight, x0 = number % across * kTileWidth;
  const int cell = threadIdx.x / Tile::kLanes;
  const int y = y0 + cell / kTileWidth, x = x0 + cell % kTileWidth;
  const int64_t channel =
      int64_t(blockIdx.y) * Tile::kChannels + threadIdx.x % Tile::kLanes * kWidth;
  const bool used = y < shape.height && x < shape.width && channel < shape.channels;
  A sum[kWidth] = {};
  for (int64_t first = 0; first < shape.count; first += kThreads) {
    bool meets = false;
    if (first + threadIdx.x < shape.count) {
      const Reach reach = in.plan.reach[first + threadIdx.x];
      meets = reach.image == image && reach.y1 < y0 + Tile::kHeight && reach.y2 >= y0 &&
          reach.x1 < x0 + kTileWidth && reach.x2 >= x0;
    }
    const unsigned bits = __ballot_sync(0xffffffffu, meets);
    __syncthreads();  // the batch before is done
    if (threadIdx.x % 32 == 0) met[threadIdx.x / 32] = bits;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) {
      for (unsigned left = used ? met[i] : 0; left != 0; left &= left - 1) {
        add_roi<T, kKind, kWidth>(
            in, winners, first + i * 32 + __ffs(static_cast<int>(left)) - 1, y, x, channel, sum);
      }
    }
  }
  if (!used) return;
  Channels<T, kWidth> result;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) result.value[k] = static_cast<T>(sum[k]);
  result.store(
      input_grad +
      ((int64_t(image) * shape.height + y) * shape.width + x) * shape.channels + channel);
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
