// Position-sensitive assembly and its mean on CUDA. Both passes are deterministic, without atomics.
#include <torch/library.h>

#include "ps_spread.cuh"

namespace d2ext {
namespace {

// A block per RoI and map.
template <class T, bool kMean>
__global__ void __launch_bounds__(kThreads, 1) assemble(
    const T* input, PsBins<Accumulate<T>> table, PsShape shape, T* output) {
  using A = Accumulate<T>;
  __shared__ A reduce[32];
  const int bins = shape.size * shape.size;
  const int64_t n = blockIdx.x;
  const int image = table.images[n];
  const unsigned* ranges = table.by_roi + n * 2 * shape.size;
  for (int64_t map = blockIdx.y; map < shape.maps; map += gridDim.y) {
    const int64_t row = n * shape.maps + map;
    const T* planes = input + (max(image, 0) * shape.maps + map) * shape.parts() * shape.cells();
    A sum = A(0);
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      A value = A(0);
      if (image >= 0) {
        const int i = bin / shape.size, j = bin % shape.size;
        const CellRange y = table.unpack(ranges[i]), x = table.unpack(ranges[shape.size + j]);
        const T* plane = planes + shape.part_of(i, j) * shape.cells();
        value = bin_sum<A>(plane, shape.width, y, x) * table.share(y, x);
      }
      if (!kMean) output[row * bins + bin] = static_cast<T>(value);
      sum += value;
    }
    if (!kMean) continue;
    sum = block_sum(sum, reduce);
    if (threadIdx.x == 0) output[row] = static_cast<T>(sum / static_cast<A>(bins));
  }
}

// What `spread` spreads. kMean: grad is (N, D), else (N, D, P, P).
template <class T, bool kMean>
struct BinGradients {
  static constexpr int kSides = 4;
  const T* grad;

  __device__ __forceinline__ void load(
      const PsShape& shape, int64_t n, int64_t map, int, int, int i, int j,
      Accumulate<T>* value) const {
    using A = Accumulate<T>;
    const int64_t row = n * shape.maps + map;
    const int bins = shape.size * shape.size;
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      if (map + side >= shape.maps) continue;
      if (kMean) {
        value[side] = static_cast<A>(grad[row + side]) / static_cast<A>(bins);
      } else {
        value[side] = static_cast<A>(grad[(row + side) * bins + i * shape.size + j]);
      }
    }
  }
};

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
    const auto stream = c10::cuda::getCurrentCUDAStream();
    dispatch(input.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const PsTable table = make_table<A>(rois, scale, shape, {inclusive});
      const auto kernel = is_mean ? assemble<T, true> : assemble<T, false>;
      const dim3 grid(
          static_cast<unsigned>(shape.count),
          static_cast<unsigned>(std::min<int64_t>(shape.maps, 65535)));
      kernel<<<grid, kThreads, 0, stream>>>(
          data.const_data_ptr<T>(), table.bins<A>(), shape,
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
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const PsTable table = make_table<Accumulate<T>>(rois, scale, shape, {inclusive});
    const T* from = upstream.const_data_ptr<T>();
    T* to = input_grad.mutable_data_ptr<T>();
    if (is_mean) {
      run_spread<T>(table, shape, BinGradients<T, true>{from}, to);
    } else {
      run_spread<T>(table, shape, BinGradients<T, false>{from}, to);
    }
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
