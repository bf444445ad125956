// Bins of all RoIs of a position-sensitive operator on CUDA: one small kernel fills a table.
#pragma once

#include <ATen/ops/empty.h>

#include "common.cuh"

namespace d2ext {

struct PsShape {
  int64_t batch, maps, count;  // maps: channels / parts
  int height, width, group, size;
  __host__ __device__ int64_t cells() const {
    return int64_t(height) * width;
  }
  __host__ __device__ int parts() const {
    return group * group;
  }
  // first output position of a part
  __host__ __device__ int part_first(int part) const {
    return (part * size + group - 1) / group;
  }
};

// What kernels see of a table: (N, 2, P) ranges, rows then columns, with 1 / length (0 when empty), and
// (N) images, -1 for a row that takes no part. Dividing in the kernels would cost calls and spills.
struct PsBins {
  const CellRange* ranges;
  const double* shares;
  const int* images;
};

struct PsTable {
  at::Tensor ranges, shares, images;
  PsBins bins() const {
    return {reinterpret_cast<const CellRange*>(ranges.const_data_ptr<int>()),
            shares.const_data_ptr<double>(), images.const_data_ptr<int>()};
  }
};

static __global__ void fill_bins(
    const float* rois, float scale, PsShape shape, PsRule rule, CellRange* ranges, double* shares,
    int* images) {
  D2EXT_GRID_STRIDE(i, shape.count * 2 * shape.size) {
    const int64_t roi = i / (2 * shape.size);
    const int axis = static_cast<int>(i / shape.size % 2), position = static_cast<int>(i % shape.size);
    const float* row = rois + roi * 5;
    const int64_t image = roi_image(row, shape.batch);
    CellRange range = {0, 0};
    if (image >= 0) {
      const PsSpan span = axis == 0 ? ps_span(row[2], row[4], scale, shape.size, rule)
                                    : ps_span(row[1], row[3], scale, shape.size, rule);
      range = ps_bin(span, position, axis == 0 ? shape.height : shape.width);
    }
    ranges[i] = range;
    shares[i] = range.last > range.first ? 1.0 / (range.last - range.first) : 0.0;
    if (axis == 0 && position == 0) images[roi] = static_cast<int>(image);
  }
}

inline PsTable make_table(
    const at::Tensor& rois, double scale, const PsShape& shape, PsRule rule) {
  const auto options = rois.options().dtype(at::kInt);
  PsTable table{
      at::empty({shape.count, 2, shape.size, 2}, options),
      at::empty({shape.count, 2, shape.size}, options.dtype(at::kDouble)),
      at::empty({shape.count}, options)};
  if (shape.count == 0) return table;
  const at::Tensor boxes = rois.to(at::kFloat).contiguous();
  const int64_t items = shape.count * 2 * shape.size;
  fill_bins<<<static_cast<unsigned>(blocks_for(items)), kThreads, 0,
              c10::cuda::getCurrentCUDAStream()>>>(
      boxes.const_data_ptr<float>(), static_cast<float>(scale), shape, rule,
      reinterpret_cast<CellRange*>(table.ranges.mutable_data_ptr<int>()),
      table.shares.mutable_data_ptr<double>(), table.images.mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return table;
}

template <class A, class T>
__device__ __forceinline__ A bin_sum(const T* plane, int width, CellRange y, CellRange x) {
  A sum = A(0);
  for (int row = y.first; row < y.last; ++row) {
    for (int column = x.first; column < x.last; ++column) {
      sum += static_cast<A>(plane[int64_t(row) * width + column]);
    }
  }
  return sum;
}

inline PsShape ps_shape(
    at::IntArrayRef input, int64_t count, int64_t group_size, int64_t out_size) {
  return {input[0], input[1] / (group_size * group_size), count, static_cast<int>(input[2]),
          static_cast<int>(input[3]), static_cast<int>(group_size), static_cast<int>(out_size)};
}

}  // namespace d2ext
