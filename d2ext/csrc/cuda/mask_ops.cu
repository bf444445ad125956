// Mask operators on CUDA: corner-anchored resize and gate. Both are deterministic.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common.cuh"

namespace d2ext {
namespace {

template <class T>
__device__ __forceinline__ Accumulate<T> resized(
    const T* mask, int height, int width, int y, int x, int out_h, int out_w) {
  using A = Accumulate<T>;
  const Lerp<A> v = resize_sample<A>(y, height, out_h), u = resize_sample<A>(x, width, out_w);
  if (!v.valid || !u.valid) return A(0);
  const T* top = mask + v.cell0 * width;
  const T* low = mask + v.cell1 * width;
  const A upper = static_cast<A>(top[u.cell0]) * (A(1) - u.weight) +
      static_cast<A>(top[u.cell1]) * u.weight;
  const A lower = static_cast<A>(low[u.cell0]) * (A(1) - u.weight) +
      static_cast<A>(low[u.cell1]) * u.weight;
  return upper * (A(1) - v.weight) + lower * v.weight;
}

// A block per plane.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) resize_forward(
    const T* masks, int height, int width, int out_h, int out_w, T* output) {
  const T* mask = masks + int64_t(blockIdx.x) * height * width;
  T* to = output + int64_t(blockIdx.x) * out_h * out_w;
  for (int i = threadIdx.x; i < out_h * out_w; i += blockDim.x) {
    to[i] = static_cast<T>(resized(mask, height, width, i / out_w, i % out_w, out_h, out_w));
  }
}

// Weight of mask cell `cell` in output position `index`.
template <class A>
__device__ __forceinline__ A resize_weight(int index, int cell, int length, int out) {
  const Lerp<A> lerp = resize_sample<A>(index, length, out);
  A weight = A(0);
  if (lerp.valid && lerp.cell0 == cell) weight += A(1) - lerp.weight;
  if (lerp.valid && lerp.cell1 == cell) weight += lerp.weight;
  return weight;
}

// Output positions that can read mask cell `cell`.
__device__ __forceinline__ CellRange readers(int cell, int length, int out) {
  CellRange range;
  range.first = max(0, static_cast<int>(int64_t(cell - 1) * out / length) - 1);
  range.last = min(out, static_cast<int>(int64_t(cell + 1) * out / length) + 2);
  return range;
}

// A block per plane; G is the type of the gradient that comes in.
template <class G, class T>
__global__ void __launch_bounds__(kThreads, 1) resize_backward(
    const G* grad, int height, int width, int out_h, int out_w, T* masks_grad) {
  using A = Accumulate<T>;
  const G* from = grad + int64_t(blockIdx.x) * out_h * out_w;
  T* to = masks_grad + int64_t(blockIdx.x) * height * width;
  for (int cell = threadIdx.x; cell < height * width; cell += blockDim.x) {
    const int y = cell / width, x = cell % width;
    const CellRange rows = readers(y, height, out_h), columns = readers(x, width, out_w);
    A sum = A(0);
    for (int i = rows.first; i < rows.last; ++i) {
      const A weight = resize_weight<A>(i, y, height, out_h);
      if (weight == A(0)) continue;
      for (int j = columns.first; j < columns.last; ++j) {
        sum += static_cast<A>(from[i * out_w + j]) * weight *
            resize_weight<A>(j, x, width, out_w);
      }
    }
    to[cell] = static_cast<T>(sum);
  }
}

struct GateShape {
  int64_t channels;
  int height, width, mask_h, mask_w;
  bool last;  // channels_last
};

constexpr int kWarps = kThreads / 32;

// Features, or with kSums the gradient of the result, times the gate; and the sums over the channels
// of gradient times features, the gradient of the gate. Neighbouring threads take neighbouring
// memory: cells, or channels where those are last. The gate is computed once per thread.
// blockIdx.y: instance.
template <class T, bool kSums>
__global__ void __launch_bounds__(kThreads, 1) gate(
    const T* __restrict__ input, const T* __restrict__ features, const T* __restrict__ masks,
    GateShape shape, T* __restrict__ output, Accumulate<T>* __restrict__ sums) {
  using A = Accumulate<T>;
  __shared__ A partial[kWarps][33];
  const int cells = shape.height * shape.width, channels = static_cast<int>(shape.channels);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.y, base = n * channels * cells;
  const int cell = shape.last ? blockIdx.x * kWarps + warp : blockIdx.x * 32 + lane;
  A sum = A(0);
  if (cell < cells) {
    const A open = resized(
        masks + n * shape.mask_h * shape.mask_w, shape.mask_h, shape.mask_w, cell / shape.width,
        cell % shape.width, shape.height, shape.width);
    const int first = shape.last ? lane : warp, step = shape.last ? 32 : kWarps;
    const int64_t start = base + (shape.last ? int64_t(cell) * channels : cell);
    const int64_t pitch = shape.last ? 1 : cells;
#pragma unroll 4
    for (int channel = first; channel < channels; channel += step) {
      const int64_t at = start + channel * pitch;
      const A value = static_cast<A>(input[at]);
      if (kSums) sum += value * static_cast<A>(features[at]);
      output[at] = static_cast<T>(value * open);
    }
  }
  if (!kSums) return;
  partial[warp][lane] = sum;
  __syncthreads();
  // the threads of a cell, in order
  const int own = threadIdx.x, count = shape.last ? kWarps : 32;
  const int to = blockIdx.x * count + own;
  if (own >= count || to >= cells) return;
  A total = A(0);
  for (int i = 0; i < (shape.last ? 32 : kWarps); ++i) {
    total += shape.last ? partial[own][i] : partial[i][own];
  }
  sums[n * cells + to] = total;
}

// The kernels count the cells of a plane, and its threads beyond the last one, in 32 bits.
void check_planes(int64_t planes, int64_t mask_h, int64_t mask_w, int64_t out_h, int64_t out_w) {
  const int64_t limit = (int64_t(1) << 31) - kThreads;
  TORCH_CHECK(
      mask_h * mask_w < limit && out_h * out_w < limit, "mask_resize: masks of ", mask_h, " x ",
      mask_w, " to ", out_h, " x ", out_w, " are too large: 2^31 cells or more on CUDA");
  TORCH_CHECK(planes < limit, "mask_resize: ", planes, " masks are too many");
}

}  // namespace

at::Tensor mask_resize_cuda(const at::Tensor& masks, int64_t out_h, int64_t out_w) {
  check_resize("mask_resize", masks, out_h, out_w);
  const c10::cuda::CUDAGuard guard(masks.device());
  const at::Tensor data = masks.contiguous();
  const int64_t planes = masks.size(0) * masks.size(1);
  check_planes(planes, masks.size(2), masks.size(3), out_h, out_w);
  at::Tensor output = at::empty(
      {masks.size(0), masks.size(1), out_h, out_w},
      data.options().memory_format(at::MemoryFormat::Contiguous));
  if (output.numel() == 0) return output;
  dispatch(masks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    resize_forward<T>
        <<<static_cast<unsigned>(planes), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            data.const_data_ptr<T>(), static_cast<int>(masks.size(2)),
            static_cast<int>(masks.size(3)), static_cast<int>(out_h), static_cast<int>(out_w),
            output.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

at::Tensor mask_resize_backward_cuda(const at::Tensor& grad, int64_t mask_h, int64_t mask_w) {
  check_resize("mask_resize", grad, mask_h, mask_w);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor upstream = grad.contiguous();
  const int64_t planes = grad.size(0) * grad.size(1);
  check_planes(planes, mask_h, mask_w, grad.size(2), grad.size(3));
  at::Tensor output = at::empty(
      {grad.size(0), grad.size(1), mask_h, mask_w},
      upstream.options().memory_format(at::MemoryFormat::Contiguous));
  if (output.numel() == 0) return output;
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    resize_backward<T, T>
        <<<static_cast<unsigned>(planes), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            upstream.const_data_ptr<T>(), static_cast<int>(mask_h), static_cast<int>(mask_w),
            static_cast<int>(grad.size(2)), static_cast<int>(grad.size(3)),
            output.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

static GateShape gate_shape(const at::Tensor& features, const at::Tensor& masks) {
  TORCH_CHECK(
      features.numel() / std::max<int64_t>(features.size(0), 1) <
              (int64_t(1) << 31) - kThreads &&
          features.size(0) <= 65535,
      "mask_gate: features are too large");
  check_planes(
      masks.size(0), masks.size(2), masks.size(3), features.size(2), features.size(3));
  return {features.size(1), static_cast<int>(features.size(2)), static_cast<int>(features.size(3)),
          static_cast<int>(masks.size(2)), static_cast<int>(masks.size(3)),
          layout_of(features) == at::MemoryFormat::ChannelsLast};
}

static dim3 gate_grid(const at::Tensor& features, const GateShape& shape) {
  const int64_t cells = features.size(2) * features.size(3);
  return dim3(
      static_cast<unsigned>(blocks_for(cells, shape.last ? kWarps : 32)),
      static_cast<unsigned>(features.size(0)));
}

at::Tensor mask_gate_cuda(const at::Tensor& features, const at::Tensor& masks) {
  check_gate("mask_gate", features, masks);
  const c10::cuda::CUDAGuard guard(features.device());
  const auto layout = layout_of(features);
  const at::Tensor data = features.contiguous(layout), gates = masks.contiguous();
  at::Tensor output = at::empty(features.sizes(), data.options().memory_format(layout));
  if (output.numel() == 0) return output;
  const GateShape shape = gate_shape(features, masks);
  dispatch(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gate<T, false><<<gate_grid(features, shape), kThreads, 0,
                     c10::cuda::getCurrentCUDAStream()>>>(
        data.const_data_ptr<T>(), nullptr, gates.const_data_ptr<T>(), shape,
        output.mutable_data_ptr<T>(), nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> mask_gate_backward_cuda(
    const at::Tensor& grad, const at::Tensor& features, const at::Tensor& masks) {
  check_gate("mask_gate", features, masks);
  TORCH_CHECK(
      grad.sizes() == features.sizes() && grad.scalar_type() == features.scalar_type() &&
          grad.device() == features.device(),
      "mask_gate: grad must have the shape of features");
  const c10::cuda::CUDAGuard guard(features.device());
  const auto layout = layout_of(features);
  const at::Tensor data = features.contiguous(layout), upstream = grad.contiguous(layout);
  const at::Tensor gates = masks.contiguous();
  at::Tensor features_grad = at::empty(features.sizes(), data.options().memory_format(layout));
  at::Tensor masks_grad = at::zeros(masks.sizes(), gates.options());
  if (features_grad.numel() == 0) return {features_grad, masks_grad};
  const GateShape shape = gate_shape(features, masks);
  const unsigned count = static_cast<unsigned>(features.size(0));
  const int64_t cells = features.size(2) * features.size(3);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Scratch<A> sums(features, features.size(0) * cells);
    gate<T, true><<<gate_grid(features, shape), kThreads, 0, stream>>>(
        upstream.const_data_ptr<T>(), data.const_data_ptr<T>(), gates.const_data_ptr<T>(), shape,
        features_grad.mutable_data_ptr<T>(), sums.get());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    resize_backward<A, T><<<count, kThreads, 0, stream>>>(
        sums.get(), shape.mask_h, shape.mask_w, shape.height, shape.width,
        masks_grad.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {features_grad, masks_grad};
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("mask_resize", &mask_resize_cuda);
  library.impl("mask_resize_backward", &mask_resize_backward_cuda);
  library.impl("mask_gate", &mask_gate_cuda);
  library.impl("mask_gate_backward", &mask_gate_backward_cuda);
}

}  // namespace d2ext
