// Mask voting on CUDA: a block per result walks the candidates of each pixel in list order. Nothing of the
// image's size is allocated, and the result does not depend on timing.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.cuh"

namespace d2ext {
namespace {

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

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("mask_vote", &mask_vote_cuda);
}

}  // namespace d2ext
