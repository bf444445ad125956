// Mask operators on CUDA: corner-anchored resize, gate, paste, vote. All are deterministic.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

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

// ------------------------------------------------------------------ vote
template <class T>
struct Votes {
  const T* masks;
  const Accumulate<T>* boxes;  // as the mode uses them
  const int* index;
  const float* weight;
  int first, last;  // candidates of this result
  int voters, size, img_h, img_w;
  Accumulate<T> thresh;
  VoteMode mode;
};

template <class A>
__device__ __forceinline__ bool in_span(A low, A high, int pixel) {
  return finite(low) && finite(high) && static_cast<A>(pixel) >= low &&
      static_cast<A>(pixel) <= high;
}

// What one voter says about a pixel inside its box.
template <class T>
__device__ __forceinline__ Accumulate<T> voter_at(
    const Votes<T>& votes, int voter, const Accumulate<T>* box, int y, int x) {
  using A = Accumulate<T>;
  const int size = votes.size;
  const bool corner = votes.mode == VoteMode::kMnc;
  const Lerp<A> u = lerp_clamped(vote_position(x, box[0], box[2], size, votes.mode), size);
  const Lerp<A> v = lerp_clamped(vote_position(y, box[1], box[3], size, votes.mode), size);
  const T* mask = votes.masks + int64_t(voter) * size * size;
  const T* top = mask + v.cell0 * size;
  const T* low = mask + v.cell1 * size;
  if (corner && (v.cell0 == size - 1 || u.cell0 == size - 1)) {
    return static_cast<A>(top[u.cell0]);
  }
  const A upper = static_cast<A>(top[u.cell0]) * (A(1) - u.weight) +
      static_cast<A>(top[u.cell1]) * u.weight;
  const A lower = static_cast<A>(low[u.cell0]) * (A(1) - u.weight) +
      static_cast<A>(low[u.cell1]) * u.weight;
  const A value = upper * (A(1) - v.weight) + lower * v.weight;
  return corner ? value : static_cast<A>(value >= votes.thresh);
}

// The weighted average at a pixel, candidates in list order.
template <class T>
__device__ Accumulate<T> average_at(const Votes<T>& votes, int y, int x) {
  using A = Accumulate<T>;
  A total = A(0);
  for (int entry = votes.first; entry < votes.last; ++entry) {
    const int voter = votes.index[entry];
    if (voter < 0 || voter >= votes.voters) continue;
    const A* box = votes.boxes + int64_t(voter) * 4;
    if (!in_span(box[0], box[2], x) || !in_span(box[1], box[3], y)) continue;
    total += static_cast<A>(votes.weight[entry]) * voter_at(votes, voter, box, y, x);
  }
  return total;
}

// A block per result.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) vote(
    Votes<T> votes, const int* offset, int entries, int results, T* out_masks, int* out_boxes) {
  using A = Accumulate<T>;
  __shared__ int region[4], tight[4];  // x1, y1, x2, y2, inclusive
  const bool strict = votes.mode == VoteMode::kMnc;
  const bool zero_counts = strict ? A(0) > votes.thresh : A(0) >= votes.thresh;
  for (int result = blockIdx.x; result < results; result += gridDim.x) {
    votes.first = min(max(offset[result], 0), entries);
    votes.last = min(max(offset[result + 1], votes.first), entries);
    __syncthreads();
    if (threadIdx.x < 4) {
      const int end = threadIdx.x % 2 == 0 ? votes.img_w : votes.img_h;
      const bool low = threadIdx.x < 2;
      // nothing yet, or the whole image
      region[threadIdx.x] = zero_counts == low ? (zero_counts ? 0 : -1) : (zero_counts ? end - 1 : end);
      tight[threadIdx.x] = low ? end : -1;
    }
    __syncthreads();
    for (int entry = votes.first + threadIdx.x; entry < votes.last; entry += blockDim.x) {
      const int voter = votes.index[entry];
      if (voter < 0 || voter >= votes.voters) continue;
      const A* box = votes.boxes + int64_t(voter) * 4;
      if (!finite(box[0]) || !finite(box[1]) || !finite(box[2]) || !finite(box[3])) continue;
      const CellRange x = vote_span(box[0], box[2], votes.img_w);
      const CellRange y = vote_span(box[1], box[3], votes.img_h);
      if (x.first >= x.last || y.first >= y.last) continue;
      atomicMin(region, x.first);
      atomicMin(region + 1, y.first);
      atomicMax(region + 2, x.last - 1);
      atomicMax(region + 3, y.last - 1);
    }
    __syncthreads();
    const int width = max(region[2] - region[0] + 1, 0);
    const int pixels = width * max(region[3] - region[1] + 1, 0);
    int low_x = votes.img_w, low_y = votes.img_h, high_x = -1, high_y = -1;
    for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
      const int y = region[1] + i / width, x = region[0] + i % width;
      const A value = average_at(votes, y, x);
      if (strict ? !(value > votes.thresh) : !(value >= votes.thresh)) continue;
      low_x = min(low_x, x), high_x = max(high_x, x);
      low_y = min(low_y, y), high_y = max(high_y, y);
    }
    if (high_x >= 0) {
      atomicMin(tight, low_x);
      atomicMin(tight + 1, low_y);
      atomicMax(tight + 2, high_x);
      atomicMax(tight + 3, high_y);
    }
    __syncthreads();
    int box[4] = {tight[0], tight[1], tight[2], tight[3]};
    if (box[2] < 0) {
      const int up = votes.mode == VoteMode::kCrop ? 1 : 0;
      box[0] = box[2] = min((votes.img_w + up) / 2, votes.img_w - 1);
      box[1] = box[3] = min((votes.img_h + up) / 2, votes.img_h - 1);
    }
    if (threadIdx.x < 4) {
      const int lane = threadIdx.x;
      out_boxes[result * 4 + lane] = lane == 0 ? box[0] : lane == 1 ? box[1] : lane == 2 ? box[2] : box[3];
    }
    const bool crop = votes.mode == VoteMode::kCrop;
    const int x0 = crop ? box[0] : 0, y0 = crop ? box[1] : 0;
    const int crop_w = crop ? box[2] - box[0] + 1 : votes.img_w;
    const int crop_h = crop ? box[3] - box[1] + 1 : votes.img_h;
    const int size = votes.size;
    for (int i = threadIdx.x; i < size * size; i += blockDim.x) {
      const Lerp<A> v = lerp_clamped(
          recrop_position<A>(i / size, box[1], box[3], size, votes.mode), crop_h);
      const Lerp<A> u = lerp_clamped(
          recrop_position<A>(i % size, box[0], box[2], size, votes.mode), crop_w);
      const bool whole = strict && (v.cell0 == crop_h - 1 || u.cell0 == crop_w - 1);
      A value = A(0);
      for (int tap = 0; tap < (whole ? 1 : 4); ++tap) {
        const bool low = tap >= 2, right = tap % 2 != 0;
        const A weight = (low ? v.weight : A(1) - v.weight) * (right ? u.weight : A(1) - u.weight);
        value += (whole ? A(1) : weight) *
            average_at(votes, y0 + (low ? v.cell1 : v.cell0), x0 + (right ? u.cell1 : u.cell0));
      }
      out_masks[(int64_t(result) * size * size) + i] = static_cast<T>(value);
    }
  }
}

}  // namespace

at::Tensor mask_resize_cuda(const at::Tensor& masks, int64_t out_h, int64_t out_w) {
  check_resize("mask_resize", masks, out_h, out_w);
  const c10::cuda::CUDAGuard guard(masks.device());
  const at::Tensor data = masks.contiguous();
  const int64_t planes = masks.size(0) * masks.size(1);
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
      features.numel() / std::max<int64_t>(features.size(0), 1) < (int64_t(1) << 31) &&
          features.size(0) <= 65535,
      "mask_gate: features are too large");
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

std::tuple<at::Tensor, at::Tensor> mask_vote_cuda(
    const at::Tensor& masks, const at::Tensor& boxes, const at::Tensor& cand_index,
    const at::Tensor& cand_offset, const at::Tensor& cand_weight, int64_t img_h, int64_t img_w,
    double binary_thresh, c10::string_view mode) {
  const char* op = "mask_vote";
  const VoteMode rule =
      check_vote(op, masks, boxes, cand_index, cand_offset, cand_weight, img_h, img_w, mode);
  TORCH_CHECK(
      img_h * img_w < (int64_t(1) << 31) && cand_index.size(0) < (int64_t(1) << 31) &&
          masks.size(0) < (int64_t(1) << 31),
      op, ": too many pixels, masks or candidates");
  const c10::cuda::CUDAGuard guard(masks.device());
  const at::Tensor data = masks.contiguous();
  at::Tensor corners = boxes.to(accumulate_type(masks)).contiguous();
  if (rule != VoteMode::kMnc) corners = corners.round();
  const at::Tensor index = cand_index.contiguous(), offset = cand_offset.contiguous();
  const at::Tensor weight = cand_weight.contiguous();
  const int64_t results = offset.size(0) - 1;
  at::Tensor out_masks = at::empty({results, masks.size(1), masks.size(2)}, data.options());
  at::Tensor out_boxes = at::empty({results, 4}, index.options());
  if (results == 0) return {out_masks, out_boxes};
  dispatch(masks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Votes<T> votes{
        data.const_data_ptr<T>(), corners.const_data_ptr<A>(), index.const_data_ptr<int>(),
        weight.const_data_ptr<float>(), 0, 0, static_cast<int>(masks.size(0)),
        static_cast<int>(masks.size(1)), static_cast<int>(img_h), static_cast<int>(img_w),
        static_cast<A>(binary_thresh), rule};
    vote<T><<<static_cast<unsigned>(blocks_for(results, 1)), kThreads, 0,
              c10::cuda::getCurrentCUDAStream()>>>(
        votes, offset.const_data_ptr<int>(), static_cast<int>(index.size(0)),
        static_cast<int>(results), out_masks.mutable_data_ptr<T>(),
        out_boxes.mutable_data_ptr<int>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out_masks, out_boxes};
}

}  // namespace d2ext
