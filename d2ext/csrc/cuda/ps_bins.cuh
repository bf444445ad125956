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
  __host__ __device__ int part_of(int i, int j) const {
    return i * group / size * group + j * group / size;
  }
  // first output position of a part
  __host__ __device__ int part_first(int part) const {
    return (part * size + group - 1) / group;
  }
};

constexpr int kMaxSide = 65535;  // cells of a map's side: a range is packed into 32 bits

// What kernels see of a table: ranges of cells, rows before columns, twice, as neighbouring threads
// have neighbouring RoIs in some kernels, neighbouring bins of one RoI in others. Dividing in the
// kernels would cost calls and spills.
template <class A>
struct PsBins {
  const unsigned* by_position;  // (2, P, N)
  const unsigned* by_roi;       // (N, 2, P)
  const int* images;            // (N), -1 for a row that takes no part
  const A* shares;              // 1 / number of cells, 0 for none

  static __device__ __forceinline__ CellRange unpack(unsigned range) {
    return {static_cast<int>(range & 0xffffu), static_cast<int>(range >> 16)};
  }
  __device__ __forceinline__ CellRange row(const PsShape& shape, int i, int64_t n) const {
    return unpack(by_position[i * shape.count + n]);
  }
  __device__ __forceinline__ CellRange column(const PsShape& shape, int j, int64_t n) const {
    return unpack(by_position[(shape.size + j) * shape.count + n]);
  }
  // Ranges of one RoI by position, packed.
  __device__ __forceinline__ const unsigned* rows_of(const PsShape& shape, int64_t n) const {
    return by_roi + n * 2 * shape.size;
  }
  __device__ __forceinline__ const unsigned* columns_of(const PsShape& shape, int64_t n) const {
    return rows_of(shape, n) + shape.size;
  }
  __device__ __forceinline__ A share(CellRange y, CellRange x) const {
    return shares[y.last - y.first] * shares[x.last - x.first];
  }
};

struct PsTable {
  at::Tensor by_position, by_roi, images, shares;
  template <class A>
  PsBins<A> bins() const {
    return {reinterpret_cast<const unsigned*>(by_position.const_data_ptr<int>()),
            reinterpret_cast<const unsigned*>(by_roi.const_data_ptr<int>()),
            images.const_data_ptr<int>(), shares.const_data_ptr<A>()};
  }
};

template <class A>
static __global__ void fill_bins(
    const float* rois, float scale, PsShape shape, PsRule rule, unsigned* by_position,
    unsigned* by_roi, int* images, A* shares) {
  const int64_t ranges = shape.count * 2 * shape.size;
  D2EXT_GRID_STRIDE(item, 2 * ranges + max(shape.height, shape.width) + 1) {
    if (item >= 2 * ranges) {
      const int64_t length = item - 2 * ranges;
      shares[length] = length > 0 ? static_cast<A>(1.0 / static_cast<double>(length)) : A(0);
      continue;
    }
    const bool roi_first = item >= ranges;
    const int64_t i = roi_first ? item - ranges : item;
    const int64_t roi = roi_first ? i / (2 * shape.size) : i % shape.count;
    const int line = static_cast<int>(roi_first ? i % (2 * shape.size) : i / shape.count);
    const int axis = line / shape.size, position = line % shape.size;
    const float* row = rois + roi * 5;
    const int64_t image = roi_image(row, shape.batch);
    CellRange range = {0, 0};
    if (image >= 0) {
      const PsSpan span = axis == 0 ? ps_span(row[2], row[4], scale, shape.size, rule)
                                    : ps_span(row[1], row[3], scale, shape.size, rule);
      range = ps_bin(span, position, axis == 0 ? shape.height : shape.width);
    }
    (roi_first ? by_roi : by_position)[i] =
        static_cast<unsigned>(range.first) | static_cast<unsigned>(range.last) << 16;
    if (!roi_first && line == 0) images[roi] = static_cast<int>(image);
  }
}

// `A`: type of the shares.
template <class A>
PsTable make_table(const at::Tensor& rois, double scale, const PsShape& shape, PsRule rule) {
  TORCH_CHECK(
      shape.height <= kMaxSide && shape.width <= kMaxSide,
      "position-sensitive operators: a map of more than ", kMaxSide, " rows or columns");
  const auto options = rois.options().dtype(at::kInt);
  const int64_t longest = std::max(shape.height, shape.width);
  PsTable table{
      at::empty({2, shape.size, shape.count}, options),
      at::empty({shape.count, 2, shape.size}, options), at::empty({shape.count}, options),
      at::empty({longest + 1}, options.dtype(c10::CppTypeToScalarType<A>::value))};
  if (shape.count == 0) return table;
  const at::Tensor boxes = rois.to(at::kFloat).contiguous();
  const int64_t items = 4 * shape.count * shape.size + longest + 1;
  fill_bins<A><<<static_cast<unsigned>(blocks_for(items)), kThreads, 0,
                 c10::cuda::getCurrentCUDAStream()>>>(
      boxes.const_data_ptr<float>(), static_cast<float>(scale), shape, rule,
      reinterpret_cast<unsigned*>(table.by_position.mutable_data_ptr<int>()),
      reinterpret_cast<unsigned*>(table.by_roi.mutable_data_ptr<int>()),
      table.images.mutable_data_ptr<int>(), table.shares.mutable_data_ptr<A>());
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
