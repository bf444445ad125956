// Mask operators on CUDA: corner-anchored resize, gate, paste. All are deterministic.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common.cuh"

namespace d2ext {
namespace {

// ------------------------------------------------------------------ resize and gate
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

// A block per instance.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) gate_forward(
    const T* features, const T* masks, GateShape shape, T* output) {
  using A = Accumulate<T>;
  const int cells = shape.height * shape.width;
  const int64_t base = int64_t(blockIdx.x) * shape.channels * cells;
  const T* mask = masks + int64_t(blockIdx.x) * shape.mask_h * shape.mask_w;
  const int channels = static_cast<int>(shape.channels);
  for (int i = threadIdx.x; i < channels * cells; i += blockDim.x) {
    const int cell = shape.last ? i / channels : i % cells;
    const A gate = resized(
        mask, shape.mask_h, shape.mask_w, cell / shape.width, cell % shape.width, shape.height,
        shape.width);
    output[base + i] = static_cast<T>(static_cast<A>(features[base + i]) * gate);
  }
}

// A block per (cell, instance): the gradient of the gate there.
template <class T>
__global__ void gate_sums(
    const T* grad, const T* features, GateShape shape, Accumulate<T>* sums) {
  using A = Accumulate<T>;
  __shared__ A reduce[32];
  const int cells = shape.height * shape.width, cell = blockIdx.x;
  const int64_t n = blockIdx.y, base = n * shape.channels * cells;
  A sum = A(0);
  for (int64_t c = threadIdx.x; c < shape.channels; c += blockDim.x) {
    const int64_t at = base + (shape.last ? cell * shape.channels + c : c * cells + cell);
    sum += static_cast<A>(grad[at]) * static_cast<A>(features[at]);
  }
  sum = block_sum(sum, reduce);
  if (threadIdx.x == 0) sums[n * cells + cell] = sum;
}

// ------------------------------------------------------------------ paste
constexpr int kPastePixels = 16;  // written by one store

template <class T>
__global__ void __launch_bounds__(kThreads, 1) paste(
    const T* masks, const Accumulate<T>* boxes, int64_t count, int size, int img_h, int img_w,
    Accumulate<T> threshold, bool as_bytes, uint8_t* output) {
  using A = Accumulate<T>;
  const int area = img_h * img_w;  // of one image, below 2^31
  const int groups = (area + kPastePixels - 1) / kPastePixels;
  for (int64_t n = blockIdx.y; n < count; n += gridDim.y) {
    const A* box = boxes + n * 4;
    const A x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
    const bool solid =
        finite(x1) && finite(y1) && finite(x2) && finite(y2) && x2 > x1 && y2 > y1;
    const T* mask = masks + n * size * size;
    uint8_t* image = output + n * area;
    for (int group = blockIdx.x * blockDim.x + threadIdx.x; group < groups;
         group += gridDim.x * blockDim.x) {
      const int first = group * kPastePixels, pixels = min(kPastePixels, area - first);
      uint32_t packed[kPastePixels / 4] = {0, 0, 0, 0};
      int y = first / img_w, x = first - y * img_w;
#pragma unroll
      for (int i = 0; i < kPastePixels; ++i) {
        A value = A(0);
        const A u = paste_position(x, x1, x2, size), v = paste_position(y, y1, y2, size);
        if (solid && u > A(-1) && u < A(size) && v > A(-1) && v < A(size)) {
          const A left = floor(u), top = floor(v), a = u - left, b = v - top;
          const int column = static_cast<int>(left), row = static_cast<int>(top);
          const A right_in = column + 1 < size ? a : A(0), left_in = column >= 0 ? A(1) - a : A(0);
          const A low_in = row + 1 < size ? b : A(0), top_in = row >= 0 ? A(1) - b : A(0);
          const int c0 = max(column, 0), c1 = min(column + 1, size - 1);
          const int r0 = max(row, 0) * size, r1 = min(row + 1, size - 1) * size;
          value = top_in *
                  (left_in * static_cast<A>(mask[r0 + c0]) +
                   right_in * static_cast<A>(mask[r0 + c1])) +
              low_in *
                  (left_in * static_cast<A>(mask[r1 + c0]) +
                   right_in * static_cast<A>(mask[r1 + c1]));
        }
        uint32_t byte = solid && value >= threshold;
        if (as_bytes) {
          byte = value > A(0) ? static_cast<uint32_t>(min(value * A(255), A(255))) : 0;
        }
        packed[i / 4] |= byte << (8 * (i % 4));
        if (++x == img_w) x = 0, ++y;
      }
      uint8_t* to = image + first;
      if (pixels == kPastePixels && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      } else {
#pragma unroll
        for (int i = 0; i < kPastePixels; ++i) {
          if (i < pixels) to[i] = static_cast<uint8_t>(packed[i / 4] >> (8 * (i % 4)));
        }
      }
    }
  }
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
    gate_forward<T><<<static_cast<unsigned>(features.size(0)), kThreads, 0,
                      c10::cuda::getCurrentCUDAStream()>>>(
        data.const_data_ptr<T>(), gates.const_data_ptr<T>(), shape,
        output.mutable_data_ptr<T>());
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
  const at::Tensor sums =
      at::empty({features.size(0), cells}, gates.options().dtype(accumulate_type(masks)));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    gate_forward<T><<<count, kThreads, 0, stream>>>(
        upstream.const_data_ptr<T>(), gates.const_data_ptr<T>(), shape,
        features_grad.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    gate_sums<T><<<dim3(static_cast<unsigned>(cells), count), 64, 0, stream>>>(
        upstream.const_data_ptr<T>(), data.const_data_ptr<T>(), shape,
        sums.mutable_data_ptr<A>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    resize_backward<A, T><<<count, kThreads, 0, stream>>>(
        sums.const_data_ptr<A>(), shape.mask_h, shape.mask_w, shape.height, shape.width,
        masks_grad.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {features_grad, masks_grad};
}

at::Tensor paste_masks_cuda(
    const at::Tensor& masks, const at::Tensor& boxes, int64_t img_h, int64_t img_w,
    double threshold) {
  check_paste("paste_masks", masks, boxes, img_h, img_w);
  TORCH_CHECK(img_h * img_w < (int64_t(1) << 31) - kPastePixels, "paste_masks: image is too large");
  const c10::cuda::CUDAGuard guard(masks.device());
  const at::Tensor data = masks.contiguous();
  const at::Tensor corners = boxes.to(accumulate_type(masks)).contiguous();
  at::Tensor output = at::empty(
      {masks.size(0), img_h, img_w}, masks.options().dtype(threshold < 0 ? at::kByte : at::kBool));
  if (output.numel() == 0) return output;
  const int64_t groups = (img_h * img_w + kPastePixels - 1) / kPastePixels;
  const dim3 grid(
      static_cast<unsigned>(blocks_for(groups)),
      static_cast<unsigned>(std::min<int64_t>(masks.size(0), 65535)));
  dispatch(masks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    paste<T><<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        data.const_data_ptr<T>(), corners.const_data_ptr<A>(), masks.size(0),
        static_cast<int>(masks.size(1)), static_cast<int>(img_h), static_cast<int>(img_w),
        static_cast<A>(threshold), threshold < 0,
        static_cast<uint8_t*>(output.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("mask_resize", &mask_resize_cuda);
  library.impl("mask_resize_backward", &mask_resize_backward_cuda);
  library.impl("mask_gate", &mask_gate_cuda);
  library.impl("mask_gate_backward", &mask_gate_backward_cuda);
  library.impl("paste_masks", &paste_masks_cuda);
}

}  // namespace d2ext
