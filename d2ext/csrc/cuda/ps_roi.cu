// Position-sensitive assembly and its mean on CUDA. The backward pass gathers: a block owns one channel
// of one image and walks the RoIs in order, so it is deterministic and needs no atomics.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ps_bins.cuh"

namespace d2ext {
namespace {

// Mean of one bin; `ranges` and `shares` are those of the RoI, `planes` those of the map.
template <class T>
__device__ __forceinline__ Accumulate<T> bin_at(
    const T* planes, const CellRange* ranges, const double* shares, const PsShape& shape, int i,
    int j) {
  using A = Accumulate<T>;
  const int part = i * shape.group / shape.size * shape.group + j * shape.group / shape.size;
  return bin_sum<A>(planes + part * shape.cells(), shape.width, ranges[i], ranges[shape.size + j]) *
      (static_cast<A>(shares[i]) * static_cast<A>(shares[shape.size + j]));
}

// A block per RoI and map.
template <class T, bool kMean>
__global__ void __launch_bounds__(kThreads, 1) assemble(
    const T* input, PsBins table, PsShape shape, T* output) {
  using A = Accumulate<T>;
  __shared__ A reduce[32];
  const int bins = shape.size * shape.size;
  const int64_t n = blockIdx.x;
  const int image = table.images[n];
  const CellRange* ranges = table.ranges + n * 2 * shape.size;
  const double* shares = table.shares + n * 2 * shape.size;
  for (int64_t map = blockIdx.y; map < shape.maps; map += gridDim.y) {
    const int64_t row = n * shape.maps + map;
    const T* planes = input + (max(image, 0) * shape.maps + map) * shape.parts() * shape.cells();
    A sum = A(0);
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      A value = A(0);
      if (image >= 0) {
        value = bin_at(planes, ranges, shares, shape, bin / shape.size, bin % shape.size);
      }
      if (!kMean) output[row * bins + bin] = static_cast<T>(value);
      sum += value;
    }
    if (!kMean) continue;
    sum = block_sum(sum, reduce);
    if (threadIdx.x == 0) output[row] = static_cast<T>(sum / static_cast<A>(bins));
  }
}

// A block per channel (part, map) of one image; threads own cells. kMean: grad is (N, D), else
// (N, D, P, P).
template <class T, bool kMean>
__global__ void __launch_bounds__(kThreads, 1) spread(
    const T* grad, PsBins table, PsShape shape, T* input_grad) {
  using A = Accumulate<T>;
  const int cells = shape.height * shape.width, bins = shape.size * shape.size;
  const int part = blockIdx.x, image = blockIdx.z;
  const int part_y = part / shape.group, part_x = part % shape.group;
  const int top = shape.part_first(part_y), bottom = shape.part_first(part_y + 1);
  const int left = shape.part_first(part_x), right = shape.part_first(part_x + 1);
  for (int64_t map = blockIdx.y; map < shape.maps; map += gridDim.y) {
    T* plane = input_grad + ((image * shape.maps + map) * shape.parts() + part) * cells;
    for (int cell = threadIdx.x; cell < cells; cell += blockDim.x) {
      const int y = cell / shape.width, x = cell % shape.width;
      A sum = A(0);
      const CellRange* rows = table.ranges;
      const double* shares = table.shares;
      const T* from = grad + map * (kMean ? 1 : bins);
      for (int n = 0; n < shape.count; ++n) {
        const CellRange* columns = rows + shape.size;
        const bool hit = table.images[n] == image && y >= rows[top].first && y < rows[bottom - 1].last &&
            x >= columns[left].first && x < columns[right - 1].last;
        for (int i = top; hit && i < bottom; ++i) {
          if (y < rows[i].first || y >= rows[i].last) continue;
          A row_sum = A(0);
          for (int j = left; j < right; ++j) {
            if (x < columns[j].first || x >= columns[j].last) continue;
            row_sum += static_cast<A>(from[kMean ? 0 : i * shape.size + j]) *
                static_cast<A>(shares[shape.size + j]);
          }
          sum += row_sum * static_cast<A>(shares[i]);
        }
        rows += 2 * shape.size;
        shares += 2 * shape.size;
        from += shape.maps * (kMean ? 1 : bins);
      }
      plane[cell] = static_cast<T>(kMean ? sum / static_cast<A>(bins) : sum);
    }
  }
}

at::Tensor run_forward(
    const char* op, const at::Tensor& input, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, bool inclusive, bool is_mean) {
  check_ps(op, "input", input, rois, scale, group_size, out_size, 1);
  const c10::cuda::CUDAGuard guard(input.device());
  const PsShape shape = ps_shape(input.sizes(), rois.size(0), group_size, out_size);
  const at::Tensor data = input.contiguous();
  std::vector<int64_t> sizes{shape.count, shape.maps};
  if (!is_mean) sizes.insert(sizes.end(), {out_size, out_size});
  at::Tensor output = at::empty(sizes, data.options().memory_format(at::MemoryFormat::Contiguous));
  if (output.numel() > 0 && data.numel() == 0) {
    output.zero_();
  } else if (output.numel() > 0) {
    const PsTable table = make_table(rois, scale, shape, {inclusive});
    const auto stream = c10::cuda::getCurrentCUDAStream();
    dispatch(input.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const auto kernel = is_mean ? assemble<T, true> : assemble<T, false>;
      const dim3 grid(
          static_cast<unsigned>(shape.count),
          static_cast<unsigned>(std::min<int64_t>(shape.maps, 65535)));
      kernel<<<grid, kThreads, 0, stream>>>(
          data.const_data_ptr<T>(), table.bins(), shape,
          output.mutable_data_ptr<T>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return is_mean ? output : output.contiguous(layout_of(input));
}

at::Tensor run_backward(
    const char* op, const at::Tensor& grad, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, at::IntArrayRef input_size, bool inclusive,
    bool is_mean) {
  check_floating(op, "grad", grad, is_mean ? 2 : 4);
  check_ps_gradient(op, grad, rois, scale, group_size, out_size, input_size);
  const c10::cuda::CUDAGuard guard(grad.device());
  const PsShape shape = ps_shape(input_size, rois.size(0), group_size, out_size);
  const at::Tensor upstream = grad.contiguous();
  at::Tensor input_grad =
      at::empty(input_size, upstream.options().memory_format(at::MemoryFormat::Contiguous));
  if (input_grad.numel() == 0) return input_grad;
  TORCH_CHECK(shape.batch <= 65535, op, ": too many images");
  const PsTable table = make_table(rois, scale, shape, {inclusive});
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = is_mean ? spread<T, true> : spread<T, false>;
    const dim3 grid(
        static_cast<unsigned>(shape.parts()),
        static_cast<unsigned>(std::min<int64_t>(shape.maps, 65535)),
        static_cast<unsigned>(shape.batch));
    kernel<<<grid, kThreads, 0, stream>>>(
        upstream.const_data_ptr<T>(), table.bins(), shape,
        input_grad.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return input_grad;
}

}  // namespace

at::Tensor ps_roi_assemble_cuda(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, bool inclusive) {
  return run_forward(
      "ps_roi_assemble", input, rois, spatial_scale, group_size, out_size, inclusive, false);
}

at::Tensor ps_roi_assemble_backward_cuda(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    at::IntArrayRef input_size, bool inclusive) {
  const int64_t out_size = grad.dim() == 4 ? grad.size(2) : 0;
  return run_backward(
      "ps_roi_assemble", grad, rois, spatial_scale, group_size, out_size, input_size, inclusive, false);
}

at::Tensor ps_roi_mean_cuda(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, bool inclusive) {
  return run_forward(
      "ps_roi_mean", input, rois, spatial_scale, group_size, out_size, inclusive, true);
}

at::Tensor ps_roi_mean_backward_cuda(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, at::IntArrayRef input_size, bool inclusive) {
  return run_backward(
      "ps_roi_mean", grad, rois, spatial_scale, group_size, out_size, input_size, inclusive,
      true);
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("ps_roi_assemble", &ps_roi_assemble_cuda);
  library.impl("ps_roi_assemble_backward", &ps_roi_assemble_backward_cuda);
  library.impl("ps_roi_mean", &ps_roi_mean_cuda);
  library.impl("ps_roi_mean_backward", &ps_roi_mean_backward_cuda);
}

}  // namespace d2ext
