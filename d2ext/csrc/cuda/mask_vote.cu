// Mask voting on CUDA. The candidates of a pixel are walked in list order; nothing of the image's
// size is allocated. A tight box is found from the inside: a coarse grid of pixels gives a part of
// it, and only what lies outside of that part is looked at more closely. The result does not depend
// on timing.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.cuh"

namespace d2ext {
namespace {

constexpr int kEntries = 256;  // candidates in shared memory at a time
constexpr int kLines = 16;     // of the first grid of pixels, along each axis
constexpr int kStep = 4;       // pixels between those of the second grid
constexpr int64_t kFill = 2048;  // blocks
static_assert(kLines * kLines % kThreads == 0, "all threads of a block meet at barriers");

template <class T>
struct Votes {
  const T* masks;
  const Accumulate<T>* boxes;  // as the mode uses them
  const int* index;
  const int* offset;
  const float* weight;
  int entries, results, voters, size, img_h, img_w;
  Accumulate<T> thresh;
  VoteMode mode;
};

// Inclusive pixels; empty when x2 < x1.
struct Extent {
  int x1, y1, x2, y2;
};

// Of one result: the union of its boxes, and the reached pixels that are known after each kernel.
struct Found {
  Extent region, coarse, middle, fine;
};

// Candidates in list order, in shared memory; those that take no part cover no pixels.
template <class A>
struct Entries {
  A box[kEntries][4];
  A weight[kEntries];
  Extent pixels[kEntries];
  int voter[kEntries];
  int first, last;  // those of the result
  int lowering;     // 1: a weight is negative or no number
};

// The candidates from number `first` on. All threads of the block call this.
template <class T>
__device__ __forceinline__ void load_entries(
    const Votes<T>& votes, int first, Entries<Accumulate<T>>& list) {
  using A = Accumulate<T>;
  __syncthreads();  // the ones before are no longer read
  const int count = min(list.last - first, kEntries);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int voter = votes.index[first + i];
    const A weight = static_cast<A>(votes.weight[first + i]);
    Extent pixels = {0, 0, -1, -1};
    if (voter >= 0 && voter < votes.voters) {
      const A* box = votes.boxes + int64_t(voter) * 4;
      bool usable = true;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        list.box[i][k] = box[k];
        usable = usable && finite(box[k]);
      }
      if (usable) {
        const CellRange x = vote_span(box[0], box[2], votes.img_w);
        const CellRange y = vote_span(box[1], box[3], votes.img_h);
        if (x.first < x.last && y.first < y.last) {
          pixels = {x.first, y.first, x.last - 1, y.last - 1};
        }
      }
    }
    list.pixels[i] = pixels;
    list.weight[i] = weight;
    list.voter[i] = voter;
    if (!(weight >= A(0)) || !finite(weight)) atomicMax(&list.lowering, 1);
  }
  __syncthreads();
}

// Start a result; its candidates are loaded, if they fit. All threads of the block call this.
template <class T>
__device__ __forceinline__ void start_result(
    const Votes<T>& votes, int result, Entries<Accumulate<T>>& list) {
  __syncthreads();
  if (threadIdx.x == 0) {
    list.first = min(max(votes.offset[result], 0), votes.entries);
    list.last = min(max(votes.offset[result + 1], list.first), votes.entries);
    list.lowering = 0;
  }
  __syncthreads();
  load_entries(votes, list.first, list);
}

template <class A>
__device__ __forceinline__ bool all_loaded(const Entries<A>& list) {
  return list.last - list.first <= kEntries;
}

__device__ __forceinline__ bool covers(const Extent& extent, int y, int x) {
  return x >= extent.x1 && x <= extent.x2 && y >= extent.y1 && y <= extent.y2;
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

// The weighted average at a pixel, candidates in list order. All threads of the block call this,
// with or without a pixel.
template <class T>
__device__ __forceinline__ Accumulate<T> average_at(
    const Votes<T>& votes, Entries<Accumulate<T>>& list, bool wanted, int y, int x) {
  Accumulate<T> total(0);
  const bool loaded = all_loaded(list);
  for (int first = list.first; first < list.last; first += kEntries) {
    if (!loaded) load_entries(votes, first, list);
    const int count = wanted ? min(list.last - first, kEntries) : 0;
    for (int i = 0; i < count; ++i) {
      if (!covers(list.pixels[i], y, x)) continue;
      total += list.weight[i] * voter_at(votes, list.voter[i], list.box[i], y, x);
    }
  }
  return total;
}

// Whether the average at a pixel reaches the threshold. A vote of 0 or 1 with a weight that is not
// negative never lowers a sum, nor its rounding, and all of them together are never less.
template <class T>
__device__ __forceinline__ bool reached_at(
    const Votes<T>& votes, Entries<Accumulate<T>>& list, bool wanted, int y, int x) {
  using A = Accumulate<T>;
  if (votes.mode == VoteMode::kMnc || !all_loaded(list) || list.lowering != 0) {
    const A total = average_at(votes, list, wanted, y, x);
    return wanted && (votes.mode == VoteMode::kMnc ? total > votes.thresh : total >= votes.thresh);
  }
  if (!wanted) return false;
  const int count = list.last - list.first;
  A most(0), total(0);
  for (int i = 0; i < count; ++i) {
    if (covers(list.pixels[i], y, x)) most += list.weight[i];
  }
  if (!(most >= votes.thresh)) return false;
  for (int i = 0; i < count && !(total >= votes.thresh); ++i) {
    if (!covers(list.pixels[i], y, x)) continue;
    total += list.weight[i] * voter_at(votes, list.voter[i], list.box[i], y, x);
  }
  return total >= votes.thresh;
}

__device__ __forceinline__ void widen(Extent* extent, const Extent& by) {
  if (by.x2 < by.x1) return;
  atomicMin(&extent->x1, by.x1);
  atomicMin(&extent->y1, by.y1);
  atomicMax(&extent->x2, by.x2);
  atomicMax(&extent->y2, by.y2);
}

__device__ __forceinline__ void include(Extent& extent, int y, int x) {
  extent.x1 = min(extent.x1, x), extent.x2 = max(extent.x2, x);
  extent.y1 = min(extent.y1, y), extent.y2 = max(extent.y2, y);
}

// The union of the boxes of a result, and what a coarse grid of pixels finds. A block per result.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) vote_coarse(Votes<T> votes, Found* found) {
  using A = Accumulate<T>;
  __shared__ Entries<A> list;
  __shared__ Extent region, reached;
  const bool strict = votes.mode == VoteMode::kMnc;
  const bool zero_counts = strict ? A(0) > votes.thresh : A(0) >= votes.thresh;
  const Extent none = {votes.img_w, votes.img_h, -1, -1};
  for (int result = blockIdx.x; result < votes.results; result += gridDim.x) {
    start_result(votes, result, list);
    if (threadIdx.x == 0) {
      region = zero_counts ? Extent{0, 0, votes.img_w - 1, votes.img_h - 1} : none;
      reached = none;
    }
    const bool loaded = all_loaded(list);
    for (int first = list.first; first < list.last; first += kEntries) {
      if (!loaded) load_entries(votes, first, list);
      else __syncthreads();
      const int count = min(list.last - first, kEntries);
      for (int i = threadIdx.x; i < count; i += blockDim.x) widen(&region, list.pixels[i]);
    }
    __syncthreads();
    const Extent whole = region;
    const int step_x = (whole.x2 - whole.x1) / kLines + 1;
    const int step_y = (whole.y2 - whole.y1) / kLines + 1;
    Extent own = none;
    for (int i = threadIdx.x; i < kLines * kLines; i += blockDim.x) {
      const int y = whole.y1 + step_y / 2 + i / kLines * step_y;
      const int x = whole.x1 + step_x / 2 + i % kLines * step_x;
      if (reached_at(votes, list, covers(whole, y, x), y, x)) include(own, y, x);
    }
    widen(&reached, own);
    __syncthreads();
    if (threadIdx.x == 0) found[result] = {whole, reached, reached, reached};
  }
}

// What the pixels outside of those known find, of a grid with `step` pixels between: several blocks
// per result. Pixels inside of the known extent cannot make it larger.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) vote_extent(
    Votes<T> votes, int step, Found* found) {
  using A = Accumulate<T>;
  __shared__ Entries<A> list;
  for (int result = blockIdx.y; result < votes.results; result += gridDim.y) {
    Found* of = found + result;
    const Extent whole = of->region;
    Extent known = step > 1 ? of->coarse : of->middle;
    if (known.x2 < known.x1) known = {whole.x1, whole.y2 + 1, whole.x2, whole.y2};
    // lines of the grid; those above, below and beside what is known
    const int above = (known.y1 - whole.y1 + step - 1) / step;
    const int below = (whole.y2 - known.y2 + step - 1) / step;
    const int left = (known.x1 - whole.x1 + step - 1) / step;
    const int right = (whole.x2 - known.x2 + step - 1) / step;
    const int wide = (whole.x2 - whole.x1) / step + 1, beside = left + right;
    const int high = (known.y2 - known.y1) / step + 1;
    const int full = whole.x2 < whole.x1 ? 0 : (above + below) * wide;
    const int pixels = full + (known.y2 < known.y1 ? 0 : beside * high);
    const int stride = gridDim.x * blockDim.x;
    if (int64_t(blockIdx.x) * blockDim.x >= pixels) continue;
    start_result(votes, result, list);
    Extent own = {votes.img_w, votes.img_h, -1, -1};
    for (int first = blockIdx.x * blockDim.x; first < pixels; first += stride) {
      const int i = first + threadIdx.x;
      int x, y;
      if (i < full) {
        const int row = i / wide;
        x = whole.x1 + (i - row * wide) * step;
        y = row < above ? whole.y1 + row * step : whole.y2 - (row - above) * step;
      } else {
        const int row = (i - full) / max(beside, 1), column = i - full - row * beside;
        x = column < left ? whole.x1 + column * step : whole.x2 - (column - left) * step;
        y = known.y1 + row * step;
      }
      if (reached_at(votes, list, i < pixels, y, x)) include(own, y, x);
      if (pixels - first <= stride) break;  // the sum may not fit
    }
    widen(step > 1 ? &of->middle : &of->fine, own);
  }
}

// Boxes, and masks read from the average inside of them: blockIdx.x takes cells of a mask.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) vote_recrop(
    Votes<T> votes, const Found* found, T* out_masks, int* out_boxes) {
  using A = Accumulate<T>;
  __shared__ Entries<A> list;
  const bool strict = votes.mode == VoteMode::kMnc, crop = votes.mode == VoteMode::kCrop;
  const int size = votes.size;
  for (int result = blockIdx.y; result < votes.results; result += gridDim.y) {
    start_result(votes, result, list);
    const Extent a = found[result].middle, b = found[result].fine;
    int box[4] = {min(a.x1, b.x1), min(a.y1, b.y1), max(a.x2, b.x2), max(a.y2, b.y2)};
    if (box[2] < 0) {
      const int up = crop ? 1 : 0;
      box[0] = box[2] = min((votes.img_w + up) / 2, votes.img_w - 1);
      box[1] = box[3] = min((votes.img_h + up) / 2, votes.img_h - 1);
    }
    if (blockIdx.x == 0 && threadIdx.x < 4) {
      const int lane = threadIdx.x;
      out_boxes[result * 4 + lane] =
          lane == 0 ? box[0] : lane == 1 ? box[1] : lane == 2 ? box[2] : box[3];
    }
    const int x0 = crop ? box[0] : 0, y0 = crop ? box[1] : 0;
    const int crop_w = crop ? box[2] - box[0] + 1 : votes.img_w;
    const int crop_h = crop ? box[3] - box[1] + 1 : votes.img_h;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const Lerp<A> v = lerp_clamped(
        recrop_position<A>(i / size, box[1], box[3], size, votes.mode), crop_h);
    const Lerp<A> u = lerp_clamped(
        recrop_position<A>(i % size, box[0], box[2], size, votes.mode), crop_w);
    const bool whole = strict && (v.cell0 == crop_h - 1 || u.cell0 == crop_w - 1);
    A value = A(0);
    for (int tap = 0; tap < 4; ++tap) {
      const bool low = tap >= 2, right = tap % 2 != 0;
      const bool wanted = i < size * size && (tap == 0 || !whole);
      const A weight = (low ? v.weight : A(1) - v.weight) * (right ? u.weight : A(1) - u.weight);
      const A average = average_at(
          votes, list, wanted, y0 + (low ? v.cell1 : v.cell0), x0 + (right ? u.cell1 : u.cell0));
      if (wanted) value += (whole ? A(1) : weight) * average;
    }
    if (i < size * size) out_masks[(int64_t(result) * size * size) + i] = static_cast<T>(value);
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
      img_h * img_w < (int64_t(1) << 31) - kThreads && cand_index.size(0) < (int64_t(1) << 31) &&
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
  const Scratch<Found> found(masks, results);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch(masks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Votes<T> votes{
        data.const_data_ptr<T>(), corners.const_data_ptr<A>(), index.const_data_ptr<int>(),
        offset.const_data_ptr<int>(), weight.const_data_ptr<float>(),
        static_cast<int>(index.size(0)), static_cast<int>(results),
        static_cast<int>(masks.size(0)), static_cast<int>(masks.size(1)), static_cast<int>(img_h),
        static_cast<int>(img_w), static_cast<A>(binary_thresh), rule};
    const int64_t cells = masks.size(1) * masks.size(2);
    // enough blocks to fill a device, however few results there are
    const int64_t parts = std::clamp<int64_t>(kFill / results, 1, 64);
    const unsigned rows = static_cast<unsigned>(std::min<int64_t>(results, 65535));
    vote_coarse<T><<<static_cast<unsigned>(blocks_for(results, 1)), kThreads, 0, stream>>>(
        votes, found.get());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    for (const int step : {kStep, 1}) {
      vote_extent<T><<<dim3(static_cast<unsigned>(parts), rows), kThreads, 0, stream>>>(
          votes, step, found.get());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    vote_recrop<T><<<dim3(static_cast<unsigned>(blocks_for(cells)), rows), kThreads, 0, stream>>>(
        votes, found.get(), out_masks.mutable_data_ptr<T>(), out_boxes.mutable_data_ptr<int>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out_masks, out_boxes};
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("mask_vote", &mask_vote_cuda);
}

}  // namespace d2ext
