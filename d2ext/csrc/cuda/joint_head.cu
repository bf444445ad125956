// FCIS' joint head on CUDA. Forward: a block takes one class and part with both planes in shared memory
// and a thread per RoI; partial sums are added up part by part. Backward: the same blocks work out the
// winners of some RoIs at a time in shared memory, then every thread gathers for the cells it owns.
// Neither uses atomics, both are deterministic, and the assembled tensor is never held.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ps_bins.cuh"

namespace d2ext {
namespace {

constexpr int kTile = 1024;  // (RoI, bin) pairs of one backward step

// Outside and inside means of a bin. kShared: `pair` holds both planes cell by cell.
template <class T, bool kShared>
__device__ __forceinline__ void bin_pair(
    const Accumulate<T>* pair, const T* outside, const T* inside, int width, CellRange y,
    CellRange x, Accumulate<T> share, Accumulate<T>& out, Accumulate<T>& in) {
  using A = Accumulate<T>;
  A sum_out = A(0), sum_in = A(0);
  for (int row = y.first; row < y.last; ++row) {
    for (int column = x.first; column < x.last; ++column) {
      const int cell = row * width + column;
      sum_out += kShared ? pair[2 * cell] : static_cast<A>(outside[cell]);
      sum_in += kShared ? pair[2 * cell + 1] : static_cast<A>(inside[cell]);
    }
  }
  out = sum_out * share;
  in = sum_in * share;
}

template <class T>
__device__ __forceinline__ void load_pair(
    const T* outside, const T* inside, int cells, Accumulate<T>* pair) {
  for (int cell = threadIdx.x; cell < cells; cell += blockDim.x) {
    pair[2 * cell] = static_cast<Accumulate<T>>(outside[cell]);
    pair[2 * cell + 1] = static_cast<Accumulate<T>>(inside[cell]);
  }
  __syncthreads();
}

// Grid (parts, classes, images). partial is (parts, K, N).
template <class T, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) head_forward(
    const T* score, PsBins table, PsShape shape, int classes, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  A* pair = reinterpret_cast<A*>(shared);
  const int part = blockIdx.x, cls = blockIdx.y, image = blockIdx.z;
  const int cells = shape.height * shape.width, size = shape.size;
  const T* outside = score + ((image * shape.maps + 2 * cls) * shape.parts() + part) * cells;
  const T* inside = outside + int64_t(shape.parts()) * cells;
  if (kShared) load_pair(outside, inside, cells, pair);
  const int part_y = part / shape.group, part_x = part % shape.group;
  const int top = shape.part_first(part_y), bottom = shape.part_first(part_y + 1);
  const int left = shape.part_first(part_x), right = shape.part_first(part_x + 1);
  A* row = partial + (int64_t(part) * classes + cls) * shape.count;
  for (int n = threadIdx.x; n < shape.count; n += blockDim.x) {
    if (table.images[n] != image) continue;
    const CellRange* rows = table.ranges + int64_t(n) * 2 * size;
    const double* shares = table.shares + int64_t(n) * 2 * size;
    A sum = A(0);
    for (int i = top; i < bottom; ++i) {
      for (int j = left; j < right; ++j) {
        A out, in;
        bin_pair<T, kShared>(
            pair, outside, inside, shape.width, rows[i], rows[size + j],
            static_cast<A>(shares[i]) * static_cast<A>(shares[size + j]), out, in);
        sum += in > out ? in : out;
      }
    }
    row[n] = sum;
  }
}

template <class A, class T>
__global__ void sum_parts(
    const A* partial, const int* images, int parts, int classes, int count, A bins, T* cls_score,
    A* exact) {
  D2EXT_GRID_STRIDE(index, int64_t(count) * classes) {
    const int n = static_cast<int>(index / classes), cls = static_cast<int>(index % classes);
    A sum = A(0);
    for (int part = 0; images[n] >= 0 && part < parts; ++part) {
      sum += partial[(int64_t(part) * classes + cls) * count + n];
    }
    sum /= bins;
    exact[index] = sum;
    cls_score[index] = static_cast<T>(sum);
  }
}

template <class A>
__global__ void pick_best(const A* exact, int classes, int count, int64_t* picked) {
  D2EXT_GRID_STRIDE(n, count) {
    const A* row = exact + n * classes;
    int best = classes < 2 ? -1 : 0;
    for (int cls = 1; cls + 1 < classes; ++cls) {  // the last is the background
      if (row[cls] > row[best]) best = cls;
    }
    picked[n] = best;
  }
}

// A block per RoI.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) read_masks(
    const T* score, PsBins table, PsShape shape, int classes, const int64_t* picked,
    T* seg_logit) {
  using A = Accumulate<T>;
  const int n = blockIdx.x, size = shape.size, bins = size * size;
  const int cells = shape.height * shape.width;
  const int image = table.images[n];
  const bool used = image >= 0 && picked[n] >= 0 && picked[n] < classes;
  const T* planes = score;
  if (used) planes += (image * shape.maps + 2 * picked[n]) * shape.parts() * cells;
  const CellRange* rows = table.ranges + int64_t(n) * 2 * size;
  const double* shares = table.shares + int64_t(n) * 2 * size;
  for (int index = threadIdx.x; index < 2 * bins; index += blockDim.x) {
    const int side = index >= bins, i = (index - side * bins) / size;
    const int j = index - side * bins - i * size;
    A value = A(0);
    if (used) {
      const int part = i * shape.group / size * shape.group + j * shape.group / size;
      value = bin_sum<A>(
                  planes + int64_t(side * shape.parts() + part) * cells, shape.width, rows[i],
                  rows[size + j]) *
          (static_cast<A>(shares[i]) * static_cast<A>(shares[size + j]));
    }
    seg_logit[int64_t(n) * 2 * bins + index] = static_cast<T>(value);
  }
}

// Grid as head_forward. Either gradient may be null. The planes of score_grad start at zero.
template <class T, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) head_backward(
    const T* grad_cls, const T* grad_seg, const T* score, PsBins table, PsShape shape,
    int classes, const int64_t* picked, Accumulate<T>* score_grad) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  __shared__ A tile_out[kTile], tile_in[kTile];
  A* pair = reinterpret_cast<A*>(shared);
  const int part = blockIdx.x, cls = blockIdx.y, image = blockIdx.z;
  const int cells = shape.height * shape.width, size = shape.size;
  const int64_t first_plane =
      ((image * shape.maps + 2 * cls) * shape.parts() + part) * cells;
  const T* outside = score + first_plane;
  const T* inside = outside + int64_t(shape.parts()) * cells;
  A* to_outside = score_grad + first_plane;
  A* to_inside = to_outside + int64_t(shape.parts()) * cells;
  if (kShared) load_pair(outside, inside, cells, pair);
  const int part_y = part / shape.group, part_x = part % shape.group;
  const int top = shape.part_first(part_y), bottom = shape.part_first(part_y + 1);
  const int left = shape.part_first(part_x), right = shape.part_first(part_x + 1);
  const int row_bins = right - left, part_bins = (bottom - top) * row_bins;
  const A all_bins = static_cast<A>(size * size);
  // a tile: some RoIs with all bins of the part, or some bins of one RoI
  const int tile_rois = max(kTile / part_bins, 1);
  const int tile_bins = min(part_bins, kTile);
  for (int n0 = 0; n0 < shape.count; n0 += tile_rois) {
    const int roi_count = min(tile_rois, static_cast<int>(shape.count) - n0);
    for (int bin0 = 0; bin0 < part_bins; bin0 += tile_bins) {
      const int bin_count = min(tile_bins, part_bins - bin0);
      __syncthreads();  // the last tile has been read
      for (int item = threadIdx.x; item < roi_count * bin_count; item += blockDim.x) {
        const int n = n0 + item / bin_count, bin = bin0 + item % bin_count;
        const int i = top + bin / row_bins, j = left + bin % row_bins;
        A by_out = A(0), by_in = A(0);
        if (table.images[n] == image) {
          const CellRange* rows = table.ranges + int64_t(n) * 2 * size;
          const double* shares = table.shares + int64_t(n) * 2 * size;
          const A share = static_cast<A>(shares[i]) * static_cast<A>(shares[size + j]);
          if (grad_cls != nullptr) {
            A out, in;
            bin_pair<T, kShared>(
                pair, outside, inside, shape.width, rows[i], rows[size + j], share, out, in);
            const A upstream =
                static_cast<A>(grad_cls[int64_t(n) * classes + cls]) / all_bins * share;
            (in > out ? by_in : by_out) = upstream;
          }
          if (grad_seg != nullptr && picked[n] == cls) {
            const T* seg = grad_seg + int64_t(n) * 2 * size * size + i * size + j;
            by_out += static_cast<A>(seg[0]) * share;
            by_in += static_cast<A>(seg[size * size]) * share;
          }
        }
        tile_out[item] = by_out;
        tile_in[item] = by_in;
      }
      __syncthreads();
      for (int cell = threadIdx.x; cell < cells; cell += blockDim.x) {
        const int y = cell / shape.width, x = cell % shape.width;
        A sum_out = A(0), sum_in = A(0);
        for (int k = 0; k < roi_count; ++k) {
          const CellRange* rows = table.ranges + int64_t(n0 + k) * 2 * size;
          const CellRange* columns = rows + size;
          if (y < rows[top].first || y >= rows[bottom - 1].last) continue;
          if (x < columns[left].first || x >= columns[right - 1].last) continue;
          for (int bin = 0; bin < bin_count; ++bin) {
            const int i = top + (bin0 + bin) / row_bins, j = left + (bin0 + bin) % row_bins;
            const bool hit = y >= rows[i].first && y < rows[i].last && x >= columns[j].first &&
                x < columns[j].last;
            if (!hit) continue;
            sum_out += tile_out[k * bin_count + bin];
            sum_in += tile_in[k * bin_count + bin];
          }
        }
        to_outside[cell] += sum_out;
        to_inside[cell] += sum_in;
      }
    }
  }
}

struct Geometry {
  PsShape shape;
  int64_t classes;
  dim3 grid;
  bool shared;  // both planes fit in shared memory
  size_t bytes;
};

Geometry geometry_of(const at::Tensor& score, int64_t count, int64_t group_size, int64_t out_size) {
  Geometry geometry;
  geometry.shape = ps_shape(score.sizes(), count, group_size, out_size);
  geometry.classes = geometry.shape.maps / 2;
  TORCH_CHECK(
      geometry.classes <= 65535 && score.size(0) <= 65535 && count < (int64_t(1) << 31),
      "fcis_joint_head: too many classes, images or rois");
  geometry.grid = dim3(
      static_cast<unsigned>(geometry.shape.parts()), static_cast<unsigned>(geometry.classes),
      static_cast<unsigned>(score.size(0)));
  const size_t item = score.scalar_type() == at::kDouble ? 8 : 4;
  geometry.bytes = 2 * item * geometry.shape.cells();
  // what every device grants without asking, less the tiles of the backward kernel
  geometry.shared = geometry.bytes <= 48 * 1024 - 2 * item * kTile - 256;
  if (!geometry.shared) geometry.bytes = 0;
  return geometry;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> fcis_joint_head_cuda(
    const at::Tensor& score, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, const std::optional<at::Tensor>& pick, bool inclusive) {
  const char* op = "fcis_joint_head";
  check_ps(op, "score", score, rois, spatial_scale, group_size, out_size, 2);
  const int64_t count = rois.size(0);
  if (pick) check_pick(op, *pick, score, count);
  const c10::cuda::CUDAGuard guard(score.device());
  const Geometry geometry = geometry_of(score, count, group_size, out_size);
  const PsShape& shape = geometry.shape;
  const int classes = static_cast<int>(geometry.classes);
  const at::Tensor data = score.contiguous();
  const auto options = data.options().memory_format(at::MemoryFormat::Contiguous);
  const auto exact_options = rois.options().dtype(accumulate_type(score));
  at::Tensor cls_score = at::zeros({count, classes}, data.options());
  at::Tensor seg_logit = at::empty({count, 2, out_size, out_size}, options);
  at::Tensor exact = at::zeros({count, classes}, exact_options);
  at::Tensor picked =
      pick ? pick->clone().contiguous() : at::empty({count}, rois.options().dtype(at::kLong));
  if (data.numel() == 0) seg_logit.zero_();
  if (count > 0) {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const PsTable table = make_table(rois, spatial_scale, shape, {inclusive});
    dispatch(score.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      if (data.numel() > 0) {
        const at::Tensor partial = at::empty({shape.parts(), classes, count}, exact_options);
        const auto kernel = geometry.shared ? head_forward<T, true> : head_forward<T, false>;
        kernel<<<geometry.grid, kThreads, geometry.bytes, stream>>>(
            data.const_data_ptr<T>(), table.bins(), shape, classes,
            partial.mutable_data_ptr<A>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        const int64_t items = count * classes;
        sum_parts<A, T><<<static_cast<unsigned>(blocks_for(items)), kThreads, 0, stream>>>(
            partial.const_data_ptr<A>(), table.bins().images, shape.parts(), classes,
            static_cast<int>(count), static_cast<A>(out_size * out_size),
            cls_score.mutable_data_ptr<T>(), exact.mutable_data_ptr<A>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (!pick) {
        pick_best<A><<<static_cast<unsigned>(blocks_for(count)), kThreads, 0, stream>>>(
            exact.const_data_ptr<A>(), classes, static_cast<int>(count),
            picked.mutable_data_ptr<int64_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (data.numel() > 0) {
        read_masks<T><<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
            data.const_data_ptr<T>(), table.bins(), shape, classes,
            picked.const_data_ptr<int64_t>(), seg_logit.mutable_data_ptr<T>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  }
  return {cls_score, seg_logit.contiguous(layout_of(score)), picked};
}

at::Tensor fcis_joint_head_backward_cuda(
    const std::optional<at::Tensor>& grad_cls, const std::optional<at::Tensor>& grad_seg,
    const at::Tensor& score, const at::Tensor& rois, const at::Tensor& picked,
    double spatial_scale, int64_t group_size, int64_t out_size, bool inclusive) {
  const char* op = "fcis_joint_head";
  check_ps(op, "score", score, rois, spatial_scale, group_size, out_size, 2);
  const int64_t count = rois.size(0), classes = score.size(1) / (2 * group_size * group_size);
  check_pick(op, picked, score, count);
  check_head_gradient(op, grad_cls, grad_seg, score, count, classes, out_size);
  const c10::cuda::CUDAGuard guard(score.device());
  const Geometry geometry = geometry_of(score, count, group_size, out_size);
  const at::Tensor data = score.contiguous();
  const at::Tensor score_grad = at::zeros(
      score.sizes(), data.options().dtype(accumulate_type(score)).memory_format(std::nullopt));
  if (score_grad.numel() > 0 && count > 0) {
    const PsTable table = make_table(rois, spatial_scale, geometry.shape, {inclusive});
    const at::Tensor cls = grad_cls ? grad_cls->contiguous() : at::Tensor();
    const at::Tensor seg = grad_seg ? grad_seg->contiguous() : at::Tensor();
    const at::Tensor numbers = picked.contiguous();
    const auto stream = c10::cuda::getCurrentCUDAStream();
    dispatch(score.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const auto kernel = geometry.shared ? head_backward<T, true> : head_backward<T, false>;
      kernel<<<geometry.grid, kThreads, geometry.bytes, stream>>>(
          cls.defined() ? cls.const_data_ptr<T>() : nullptr,
          seg.defined() ? seg.const_data_ptr<T>() : nullptr, data.const_data_ptr<T>(),
          table.bins(), geometry.shape, static_cast<int>(classes),
          numbers.const_data_ptr<int64_t>(), score_grad.mutable_data_ptr<A>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return score_grad.to(score.scalar_type()).contiguous(layout_of(score));
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("fcis_joint_head", &fcis_joint_head_cuda);
  library.impl("fcis_joint_head_backward", &fcis_joint_head_backward_cuda);
}

}  // namespace d2ext
