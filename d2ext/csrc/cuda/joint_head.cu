// FCIS' joint head on CUDA. Forward: a block takes one class and part with both planes in shared
// memory and a thread per RoI; partial sums are added up part by part. Backward: the same blocks
// note which side wins every bin, one bit each, and `spread` does the rest. Neither uses atomics,
// both are deterministic, and the assembled tensor is never held.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ps_spread.cuh"

namespace d2ext {
namespace {

// Which side wins the bins of a part, a bit each. The words of a part are N apart.
using Winners = uint16_t;
constexpr int kWinnerBits = 16;

__host__ __device__ inline int winner_words(const PsShape& shape) {
  const int side = (shape.size + shape.group - 1) / shape.group;  // bins of the largest part
  return (side * side + kWinnerBits - 1) / kWinnerBits;
}

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

// Grid (parts, classes, images). Of all bins of a part: the sum of their maxima, (parts, K, N), or
// kWinners: whether inside is the larger one, (parts, K, words, N).
template <class T, bool kShared, bool kWinners>
__global__ void __launch_bounds__(kThreads, 1) head_forward(
    const T* score, PsBins<Accumulate<T>> table, PsShape shape,
    std::conditional_t<kWinners, Winners, Accumulate<T>>* result) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  A* pair = reinterpret_cast<A*>(shared);
  const int part = blockIdx.x, cls = blockIdx.y, image = blockIdx.z, classes = gridDim.y;
  const int cells = shape.height * shape.width;
  const T* outside = score + ((image * shape.maps + 2 * cls) * shape.parts() + part) * cells;
  const T* inside = outside + int64_t(shape.parts()) * cells;
  if (kShared) load_pair(outside, inside, cells, pair);
  const int part_y = part / shape.group, part_x = part % shape.group;
  const int top = shape.part_first(part_y), bottom = shape.part_first(part_y + 1);
  const int left = shape.part_first(part_x), right = shape.part_first(part_x + 1);
  const int words = kWinners ? winner_words(shape) : 1;
  for (int n = threadIdx.x; n < shape.count; n += blockDim.x) {
    if (table.images[n] != image) continue;
    auto* to = result + (int64_t(part) * classes + cls) * words * shape.count + n;
    A sum = A(0);
    unsigned word = 0;
    int bit = 0;
    for (int i = top; i < bottom; ++i) {
      const CellRange y = table.row(shape, i, n);
      for (int j = left; j < right; ++j) {
        const CellRange x = table.column(shape, j, n);
        A out, in;
        bin_pair<T, kShared>(
            pair, outside, inside, shape.width, y, x, table.share(y, x), out, in);
        sum += in > out ? in : out;
        if (!kWinners) continue;
        if (in > out) word |= 1u << bit;
        if (++bit < kWinnerBits) continue;
        *to = static_cast<Winners>(word);
        to += shape.count;
        word = 0;
        bit = 0;
      }
    }
    if constexpr (!kWinners) *to = sum;
    if (kWinners && bit > 0) *to = static_cast<Winners>(word);
  }
}

// `exact` is (K, N).
template <class A, class T>
__global__ void sum_parts(
    const A* partial, const int* images, int parts, int classes, int count, A bins, T* cls_score,
    A* exact) {
  D2EXT_GRID_STRIDE(index, int64_t(count) * classes) {
    const int n = static_cast<int>(index % count), cls = static_cast<int>(index / count);
    A sum = A(0);
    for (int part = 0; images[n] >= 0 && part < parts; ++part) {
      sum += partial[(int64_t(part) * classes + cls) * count + n];
    }
    sum /= bins;
    exact[index] = sum;
    cls_score[int64_t(n) * classes + cls] = static_cast<T>(sum);
  }
}

template <class A>
__global__ void pick_best(const A* exact, int classes, int count, int64_t* picked) {
  D2EXT_GRID_STRIDE(n, count) {
    int best = classes < 2 ? -1 : 0;
    A most = classes < 2 ? A(0) : exact[n];
    for (int cls = 1; cls + 1 < classes; ++cls) {  // the last is the background
      const A value = exact[int64_t(cls) * count + n];
      if (!(value > most)) continue;
      best = cls;
      most = value;
    }
    picked[n] = best;
  }
}

// A block per RoI.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) read_masks(
    const T* score, PsBins<Accumulate<T>> table, PsShape shape, int classes,
    const int64_t* picked, T* seg_logit) {
  using A = Accumulate<T>;
  const int n = blockIdx.x, size = shape.size, bins = size * size;
  const int cells = shape.height * shape.width;
  const int image = table.images[n];
  const bool used = image >= 0 && picked[n] >= 0 && picked[n] < classes;
  const T* planes = score;
  if (used) planes += (image * shape.maps + 2 * picked[n]) * shape.parts() * cells;
  const unsigned* ranges = table.by_roi + int64_t(n) * 2 * size;
  for (int index = threadIdx.x; index < 2 * bins; index += blockDim.x) {
    const int side = index >= bins, i = (index - side * bins) / size;
    const int j = index - side * bins - i * size;
    A value = A(0);
    if (used) {
      const CellRange y = table.unpack(ranges[i]), x = table.unpack(ranges[size + j]);
      const T* plane = planes + int64_t(side * shape.parts() + shape.part_of(i, j)) * cells;
      value = bin_sum<A>(plane, shape.width, y, x) * table.share(y, x);
    }
    seg_logit[int64_t(n) * 2 * bins + index] = static_cast<T>(value);
  }
}

// What `spread` spreads: outside and inside of a class, maps `map` and `map + 1`. Either gradient may be null.
template <class T>
struct HeadGradients {
  static constexpr int kSides = 2;
  const T* cls;            // (N, K)
  const T* seg;            // (N, 2, P, P)
  const Winners* winners;  // of head_forward
  const int64_t* picked;

  __device__ __forceinline__ void load(
      const PsShape& shape, int64_t n, int64_t map, int part, int bin, int i, int j,
      Accumulate<T>* value) const {
    using A = Accumulate<T>;
    const int64_t classes = shape.maps / 2, cls_number = map / 2;
    const int all = shape.size * shape.size;
    if (cls != nullptr) {
      const int64_t word = (part * classes + cls_number) * winner_words(shape) + bin / kWinnerBits;
      const bool in = (winners[word * shape.count + n] >> bin % kWinnerBits & 1) != 0;
      const A upstream = static_cast<A>(cls[n * classes + cls_number]) / static_cast<A>(all);
      value[0] = in ? A(0) : upstream;
      value[1] = in ? upstream : A(0);
    }
    if (seg != nullptr && picked[n] == cls_number) {
      const T* from = seg + n * 2 * all + i * shape.size + j;
      value[0] += static_cast<A>(from[0]);
      value[1] += static_cast<A>(from[all]);
    }
  }
};

struct Geometry {
  PsShape shape;
  int64_t classes;
  dim3 grid;
  int threads;
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
  // every thread has as many RoIs, in whole warps
  const int64_t rounds = std::max<int64_t>((count + kThreads - 1) / kThreads, 1);
  const int64_t warps = (count + rounds * 32 - 1) / (rounds * 32);
  geometry.threads = static_cast<int>(std::max<int64_t>(warps * 32, kThreads / 2));
  const size_t item = score.scalar_type() == at::kDouble ? 8 : 4;
  geometry.bytes = 2 * item * geometry.shape.cells();
  geometry.shared = geometry.bytes <= 48 * 1024;  // what every device grants without asking
  if (!geometry.shared) geometry.bytes = 0;
  return geometry;
}

template <class T, bool kWinners, class Result>
void run_forward(
    const Geometry& geometry, const at::Tensor& score, const PsTable& table, Result* result) {
  const auto kernel =
      geometry.shared ? head_forward<T, true, kWinners> : head_forward<T, false, kWinners>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  kernel<<<geometry.grid, geometry.threads, geometry.bytes, stream>>>(
      score.const_data_ptr<T>(), table.bins<Accumulate<T>>(), geometry.shape, result);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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
    dispatch(score.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const PsTable table = make_table<A>(rois, spatial_scale, shape, {inclusive});
      if (data.numel() > 0) {
        const at::Tensor partial = at::empty({shape.parts(), classes, count}, exact_options);
        run_forward<T, false>(geometry, data, table, partial.mutable_data_ptr<A>());
        const int64_t items = count * classes;
        sum_parts<A, T><<<static_cast<unsigned>(blocks_for(items)), kThreads, 0, stream>>>(
            partial.const_data_ptr<A>(), table.images.const_data_ptr<int>(), shape.parts(), classes,
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
            data.const_data_ptr<T>(), table.bins<A>(), shape, classes,
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
  at::Tensor score_grad =
      at::empty(score.sizes(), data.options().memory_format(at::MemoryFormat::Contiguous));
  if (score_grad.numel() == 0) return score_grad.contiguous(layout_of(score));
  const at::Tensor cls = grad_cls ? grad_cls->contiguous() : at::Tensor();
  const at::Tensor seg = grad_seg ? grad_seg->contiguous() : at::Tensor();
  const at::Tensor numbers = picked.contiguous();
  const PsShape& shape = geometry.shape;
  dispatch(score.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const PsTable table = make_table<Accumulate<T>>(rois, spatial_scale, shape, {inclusive});
    HeadGradients<T> values{
        nullptr, seg.defined() ? seg.const_data_ptr<T>() : nullptr, nullptr,
        numbers.const_data_ptr<int64_t>()};
    at::Tensor winners;
    if (cls.defined() && count > 0) {
      winners = at::empty(
          {shape.parts(), classes, winner_words(shape), count},
          rois.options().dtype(at::kShort));
      auto* words = reinterpret_cast<Winners*>(winners.mutable_data_ptr<int16_t>());
      run_forward<T, true>(geometry, data, table, words);
      values.cls = cls.const_data_ptr<T>();
      values.winners = words;
    }
    run_spread<T>(table, shape, values, score_grad.mutable_data_ptr<T>());
  });
  return score_grad.contiguous(layout_of(score));
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("fcis_joint_head", &fcis_joint_head_cuda);
  library.impl("fcis_joint_head_backward", &fcis_joint_head_backward_cuda);
}

}  // namespace d2ext
