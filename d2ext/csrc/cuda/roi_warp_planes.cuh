// Forward kernel of the RoI warp for maps in NCHW of moderate size: a block holds some whole planes in
// shared memory, their channels side by side, and serves many RoIs from there. The map is read once for
// each chunk of RoIs, not once for every RoI, and no tensor is turned.
#pragma once

#include "roi_warp_kernels.cuh"

namespace d2ext {
namespace {

constexpr int kPlanesBytes = 47 * 1024;  // of shared memory; 48 KiB are granted without asking
constexpr int kTogether = 8;             // RoIs that a block has in shared memory at a time, at most
constexpr int kServed = 4;               // bins that a block makes of each cell, at least

// How the work is cut; planes = 0: the planes do not fit, or there would be too many blocks.
struct PlaneCut {
  int planes;      // of a block
  int together;    // RoIs at a time
  int64_t groups;  // of planes
  int64_t chunk;   // RoIs of a block
  int64_t blocks;  // groups, then images, then chunks
  int threads;
  size_t bytes;  // of shared memory
};

// `item`: bytes of a value of the map, `table`: of the samples of a RoI.
inline PlaneCut plane_cut(const WarpShape& shape, int64_t item, int64_t table) {
  const int64_t cells = int64_t(shape.height) * shape.width;
  const int64_t bins = int64_t(shape.out_h) * shape.out_w;
  const int64_t enough = std::max<int64_t>((kServed * cells + bins - 1) / bins, 1);
  const int64_t most = std::max<int64_t>(shape.count / enough, 1);
  PlaneCut cut = {};
  cut.chunk = (shape.count + most - 1) / most;
  cut.threads = static_cast<int>(std::min<int64_t>((bins + 31) / 32 * 32, kThreads));
  const int64_t chunks = (shape.count + cut.chunk - 1) / cut.chunk;
  for (const int planes : {4, 2}) {
    const int64_t left = kPlanesBytes - cells * planes * item;
    cut.groups = (shape.channels + planes - 1) / planes;
    if (left < table || cut.groups > INT_MAX / (shape.batch * chunks)) continue;
    cut.planes = planes;
    cut.together = static_cast<int>(std::min<int64_t>(left / table, kTogether));
    cut.blocks = cut.groups * shape.batch * chunks;
    cut.bytes = cells * planes * item + cut.together * table;
    break;
  }
  return cut;
}

// What a block does.
template <int kWidth>
struct PlaneBlock {
  int64_t channel, begin, end;  // the first channel; RoIs begin <= roi < end
  int image, lanes;             // lanes: planes that there are, of kWidth

  __device__ __forceinline__ PlaneBlock(const WarpShape& shape, const PlaneCut& cut)
      : channel(blockIdx.x % cut.groups * kWidth),
        begin(blockIdx.x / (cut.groups * shape.batch) * cut.chunk),
        end(min(begin + cut.chunk, shape.count)),
        image(static_cast<int>(blockIdx.x / cut.groups % shape.batch)),
        lanes(static_cast<int>(min(int64_t(kWidth), shape.channels - channel))) {}

  // Whether a RoI of the chunk is of the image; all threads call this, `found` is shared. Rows that
  // take no part are the first image's, which answers for them.
  template <class A>
  __device__ __forceinline__ bool has_rois(const A* rois, int64_t batch, int* found) const {
    if (batch == 1) return true;
    if (threadIdx.x == 0) *found = 0;
    __syncthreads();
    for (int64_t roi = begin + threadIdx.x; roi < end; roi += blockDim.x) {
      if (answers_for(roi_image(rois + roi * 5, batch))) atomicMax(found, 1);
    }
    __syncthreads();
    return *found != 0;
  }
  __device__ __forceinline__ bool answers_for(int64_t of) const {
    return max(of, int64_t(0)) == image;
  }
};

template <class T, int kWidth>
__device__ __forceinline__ void load_planes(
    const T* input, const PlaneBlock<kWidth>& block, const WarpShape& shape,
    Channels<T, kWidth>* planes) {
  const int cells = shape.height * shape.width;
  const T* from = input + (block.image * shape.channels + block.channel) * cells;
  for (int cell = threadIdx.x; cell < cells; cell += blockDim.x) {
    Channels<T, kWidth> values;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      values.value[k] = k < block.lanes ? from[int64_t(k) * cells + cell] : T(0);
    }
    planes[cell] = values;
  }
}

// Samples of `count` RoIs, columns then rows, and their images; -1: the row takes no part and has no
// samples. All threads call this, before and after which they meet.
template <class A, Kind kKind>
__device__ __forceinline__ void load_samples(
    const A* rois, int count, A scale, const WarpShape& shape, WarpSample<A>* tables,
    int* images) {
  const int bins_x = shape.out_w * kPerBin<kKind>, bins_y = shape.out_h * kPerBin<kKind>;
  __syncthreads();
  for (int i = threadIdx.x; i < count * (bins_x + bins_y); i += blockDim.x) {
    const int number = i / (bins_x + bins_y), sample = i - number * (bins_x + bins_y);
    const A* roi = rois + number * 5;
    const int image = static_cast<int>(roi_image(roi, shape.batch));
    if (sample == 0) images[number] = image;
    if (image < 0) continue;
    const bool along_x = sample < bins_x;
    const int length = along_x ? shape.width : shape.height, all = along_x ? bins_x : bins_y;
    tables[i] = warp_sample(
        warp_span(roi[along_x ? 1 : 2], roi[along_x ? 3 : 4], scale, length, all, shape.rule),
        along_x ? sample : sample - bins_x, 0, length, all, shape.rule);
  }
  __syncthreads();
}

template <class A, Kind kKind>
__device__ __forceinline__ Box<A, kKind> box_of(
    const WarpSample<A>* tables, int number, const WarpShape& shape) {
  const int bins_x = shape.out_w * kPerBin<kKind>, bins_y = shape.out_h * kPerBin<kKind>;
  const WarpSample<A>* table = tables + number * (bins_x + bins_y);
  return {{{}, table, shape.width, bins_x, shape.rule},
          {{}, table + bins_x, shape.height, bins_y, shape.rule}, 0};
}

// Input and output NCHW. Shared memory: the planes, then the samples of cut.together RoIs.
template <class T, Kind kKind, int kWidth>
__global__ void
__launch_bounds__(kThreads, kResident<T, kKind, kWidth, (kKind == Kind::kPool ? 3 : 4)>)
planes_forward(
    const T* __restrict__ input, const Accumulate<T>* __restrict__ rois, Accumulate<T> scale,
    WarpShape shape, PlaneCut cut, T* output) {
  using A = Accumulate<T>;
  using Cell = Channels<T, kWidth>;
  extern __shared__ double2 planes_and_tables[];
  __shared__ int images[kTogether], found;
  const PlaneBlock<kWidth> block(shape, cut);
  if (!block.has_rois(rois, shape.batch, &found)) return;
  Cell* planes = reinterpret_cast<Cell*>(planes_and_tables);
  WarpSample<A>* tables =
      reinterpret_cast<WarpSample<A>*>(planes + shape.height * shape.width);
  load_planes(input, block, shape, planes);
  const int bins = shape.out_h * shape.out_w;
  for (int64_t first = block.begin; first < block.end; first += cut.together) {
    const int count = static_cast<int>(min(int64_t(cut.together), block.end - first));
    load_samples<A, kKind>(rois + first * 5, count, scale, shape, tables, images);
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      const int p = bin / shape.out_w, q = bin - p * shape.out_w;
      for (int number = 0; number < count; ++number) {
        if (!block.answers_for(images[number])) continue;
        A value[kWidth] = {};
        if (images[number] >= 0) {
          int winner[kWidth];
          bin_values<T, A, kKind, kWidth>(
              planes->value, kWidth, shape.width, box_of<A, kKind>(tables, number, shape), p, q,
              value, winner);
        }
        T* to = output + ((first + number) * shape.channels + block.channel) * bins + bin;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          if (k < block.lanes) to[int64_t(k) * bins] = static_cast<T>(value[k]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace d2ext
