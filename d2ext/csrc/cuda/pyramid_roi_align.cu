// Pyramid RoI align on CUDA: one launch for all boxes of all levels. A block takes one RoI and 32
// channels, with the samples of both axes in shared memory. The backward pass adds to the gradients of
// the levels where they lie, with atomic additions; under torch.use_deterministic_algorithms a warp owns
// 32 channels of a level of an image and takes its boxes in order. Its gradients are channels_last,
// so that 32 additions to neighbours are four sectors of memory.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.cuh"

namespace d2ext {
namespace {

constexpr int kChannels = 32;
constexpr int kTable = 512;  // samples of one axis kept in shared memory; more are computed again

struct AlignShape {
  int64_t batch, channels, count;
  int levels, out_h, out_w, sampling, average;
};

// T: const data of the forward pass, or the gradients.
template <class T, class A>
struct Levels {
  T* data[kMaxLevels];
  A scale[kMaxLevels];
  int height[kMaxLevels], width[kMaxLevels];
};

template <class A>
struct Axis {
  AlignSpan<A> span;
  const AlignSample<A>* table;  // null when it holds too few
  int length;

  __device__ __forceinline__ CellRange range(int bin) const {
    return table == nullptr ? align_range(span, bin, length) : CellRange{0, span.count};
  }
  __device__ __forceinline__ AlignSample<A> at(int bin, int sub) const {
    return table == nullptr ? align_sample(span, bin, sub, length) : table[bin * span.count + sub];
  }
};

template <class A>
struct Tables {
  AlignSample<A> y[kTable], x[kTable];
};

template <class A>
struct Box {
  Axis<A> y, x;
  int64_t image;  // < 0: the row takes no part
  int level;
  A share;  // of a sample in its bin
};

template <class A>
__device__ __forceinline__ void fill_axis(Axis<A>& axis, AlignSample<A>* table, int bins) {
  axis.table = nullptr;
  if (int64_t(axis.span.count) * bins > kTable) return;
  axis.table = table;
  for (int i = threadIdx.x; i < axis.span.count * bins; i += blockDim.x) {
    table[i] = align_sample(axis.span, i / axis.span.count, i % axis.span.count, axis.length);
  }
}

// All threads of the block call this.
template <class T, class A>
__device__ __forceinline__ Box<A> load_box(
    const A* roi, int level, const Levels<T, A>& levels, const AlignShape& shape,
    Tables<A>& tables) {
  Box<A> box;
  box.level = level;
  box.image = level < 0 ? -1 : roi_image(roi, shape.batch);
  if (box.image < 0 || levels.height[level] == 0 || levels.width[level] == 0) {
    box.image = -1;
    return box;
  }
  const int bins_y = shape.out_h * shape.average, bins_x = shape.out_w * shape.average;
  const A scale = levels.scale[level];
  box.y = {align_span(roi[2], roi[4], scale, bins_y, shape.sampling), nullptr, levels.height[level]};
  box.x = {align_span(roi[1], roi[3], scale, bins_x, shape.sampling), nullptr, levels.width[level]};
  const A fine = static_cast<A>(shape.average) * static_cast<A>(shape.average);
  const A samples = static_cast<A>(box.y.span.count) * static_cast<A>(box.x.span.count) * fine;
  box.share = samples > A(0) ? A(1) / samples : A(0);
  fill_axis(box.y, tables.y, bins_y);
  fill_axis(box.x, tables.x, bins_x);
  __syncthreads();
  return box;
}

// Calls visit(cell, weight) for the four cells of every sample of bin (p, q).
template <class A, class Visit>
__device__ __forceinline__ void visit_bin(
    const Box<A>& box, int average, int p, int q, const Visit& visit) {
  const int width = box.x.length;
  for (int fine_y = p * average; fine_y < (p + 1) * average; ++fine_y) {
    const CellRange rows = box.y.range(fine_y);
    for (int i = rows.first; i < rows.last; ++i) {
      const AlignSample<A> y = box.y.at(fine_y, i);
      if (!y.valid) continue;
      const int top = y.cell0 * width, low = y.cell1 * width;
      for (int fine_x = q * average; fine_x < (q + 1) * average; ++fine_x) {
        const CellRange columns = box.x.range(fine_x);
        for (int j = columns.first; j < columns.last; ++j) {
          const AlignSample<A> x = box.x.at(fine_x, j);
          if (!x.valid) continue;
          visit(top + x.cell0, y.weight0 * x.weight0);
          visit(top + x.cell1, y.weight0 * x.weight1);
          visit(low + x.cell0, y.weight1 * x.weight0);
          visit(low + x.cell1, y.weight1 * x.weight1);
        }
      }
    }
  }
}

// The cells along one axis that the samples of a bin read, each once with the sum of its weights:
// neighbouring samples share cells, and what they add to one is added in one go.
template <class A>
struct Cells {
  const Axis<A>& axis;
  int fine, end, sub, last;  // the sample that is next
  int held[2] = {-1, -1};    // cells of the last sample, which the next may share; -1: none
  A sum[2] = {A(0), A(0)};
  int cell = -1;
  A weight = A(0);

  __device__ __forceinline__ Cells(const Axis<A>& axis, int average, int bin)
      : axis(axis), fine(bin * average - 1), end(bin * average + average), sub(0), last(0) {}

  // Whether there is one more, in `cell` and `weight`.
  __device__ __forceinline__ bool next() {
    while (true) {
      if (sub < last) {
        const AlignSample<A> sample = axis.at(fine, sub);
        if (!sample.valid || held[0] < 0 || held[0] == sample.cell0) {
          ++sub;
          if (!sample.valid) continue;
          held[0] = sample.cell0;
          held[1] = sample.cell1 == sample.cell0 ? -1 : sample.cell1;
          sum[0] += sample.weight0;
          sum[1] += sample.weight1;
          continue;
        }
      } else if (fine + 1 < end) {
        const CellRange range = axis.range(++fine);
        sub = range.first;
        last = range.last;
        continue;
      }
      if (held[0] < 0) return false;
      cell = held[0];
      weight = sum[0];
      held[0] = held[1];
      sum[0] = sum[1];
      held[1] = -1;
      sum[1] = A(0);
      return true;
    }
  }
};

// Calls visit(cell, weight) for every cell that bin (p, q) reads.
template <class A, class Visit>
__device__ __forceinline__ void visit_cells(
    const Box<A>& box, int average, int p, int q, const Visit& visit) {
  for (Cells<A> y(box.y, average, p); y.next();) {
    for (Cells<A> x(box.x, average, q); x.next();) {
      visit(y.cell * box.x.length + x.cell, y.weight * x.weight);
    }
  }
}

// Where the first cell of a channel of an image lies.
__device__ __forceinline__ int64_t plane_offset(
    int64_t image, int64_t channel, int64_t channels, int64_t cells, bool last) {
  return image * channels * cells + channel * (last ? 1 : cells);
}

// kLast: channels_last data and output.
template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads, 1) align_forward(
    Levels<const T, Accumulate<T>> levels, const Accumulate<T>* rois, const int* level_of,
    AlignShape shape, T* output) {
  using A = Accumulate<T>;
  __shared__ Tables<A> tables;
  const int64_t roi = blockIdx.x;
  const int64_t channel0 = int64_t(blockIdx.y) * kChannels;
  const int channels = static_cast<int>(min(int64_t(kChannels), shape.channels - channel0));
  const int bins = shape.out_h * shape.out_w;
  const Box<A> box = load_box<const T, A>(rois + roi * 5, level_of[roi], levels, shape, tables);
  T* const to = output + plane_offset(roi, channel0, shape.channels, bins, kLast);
  const T* from = nullptr;
  int64_t cells = 0;
  if (box.image >= 0) {
    cells = int64_t(box.y.length) * box.x.length;
    from = levels.data[box.level] +
        plane_offset(box.image, channel0, shape.channels, cells, kLast);
  }
  for (int i = threadIdx.x; i < bins * channels; i += blockDim.x) {
    const int bin = kLast ? i / channels : i % bins;
    const int channel = kLast ? i % channels : i / bins;
    A value = A(0);
    if (box.image >= 0) {
      const T* plane = from + (kLast ? channel : channel * cells);
      const int64_t step = kLast ? shape.channels : 1;
      visit_bin(box, shape.average, bin / shape.out_w, bin % shape.out_w, [&](int cell, A weight) {
        value += weight * static_cast<A>(plane[cell * step]);
      });
      value *= box.share;
    }
    to[kLast ? bin * shape.channels + channel : channel * bins + bin] = static_cast<T>(value);
  }
}

// Grad and gradients are channels_last.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) align_backward(
    const T* grad, const Accumulate<T>* rois, const int* level_of, AlignShape shape,
    Levels<Accumulate<T>, Accumulate<T>> levels) {
  using A = Accumulate<T>;
  __shared__ Tables<A> tables;
  const int64_t roi = blockIdx.x;
  const int64_t channel0 = int64_t(blockIdx.y) * kChannels;
  const int channels = static_cast<int>(min(int64_t(kChannels), shape.channels - channel0));
  const int bins = shape.out_h * shape.out_w;
  const Box<A> box = load_box<A, A>(rois + roi * 5, level_of[roi], levels, shape, tables);
  if (box.image < 0) return;
  const int64_t cells = int64_t(box.y.length) * box.x.length;
  A* const to =
      levels.data[box.level] + plane_offset(box.image, channel0, shape.channels, cells, true);
  const T* const from = grad + plane_offset(roi, channel0, shape.channels, bins, true);
  for (int i = threadIdx.x; i < bins * channels; i += blockDim.x) {
    const int bin = i / channels, channel = i % channels;
    const A upstream = static_cast<A>(from[bin * shape.channels + channel]) * box.share;
    visit_cells(box, shape.average, bin / shape.out_w, bin % shape.out_w, [&](int cell, A weight) {
      atomicAdd(to + cell * shape.channels + channel, weight * upstream);
    });
  }
}

// Without atomics: blockIdx.x is an image and level, a thread owns a channel of it.
template <class T>
__global__ void __launch_bounds__(kChannels, 1) align_backward_ordered(
    const T* grad, const Accumulate<T>* rois, const int* level_of, AlignShape shape,
    Levels<Accumulate<T>, Accumulate<T>> levels) {
  using A = Accumulate<T>;
  __shared__ Tables<A> tables;
  const int64_t image = blockIdx.x / shape.levels;
  const int level = static_cast<int>(blockIdx.x % shape.levels);
  const int64_t channel = int64_t(blockIdx.y) * kChannels + threadIdx.x;
  const int bins = shape.out_h * shape.out_w;
  const int64_t cells = int64_t(levels.height[level]) * levels.width[level];
  A* const to = levels.data[level] + plane_offset(image, channel, shape.channels, cells, true);
  for (int64_t roi = 0; roi < shape.count; ++roi) {
    if (level_of[roi] != level || roi_image(rois + roi * 5, shape.batch) != image) continue;
    __syncthreads();  // the tables of the last box are no longer read
    const Box<A> box = load_box<A, A>(rois + roi * 5, level, levels, shape, tables);
    if (box.image < 0 || channel >= shape.channels) continue;
    const T* const from = grad + plane_offset(roi, channel, shape.channels, bins, true);
    for (int bin = 0; bin < bins; ++bin) {
      const A upstream = static_cast<A>(from[bin * shape.channels]) * box.share;
      visit_cells(
          box, shape.average, bin / shape.out_w, bin % shape.out_w, [&](int cell, A weight) {
            to[cell * shape.channels] += weight * upstream;
          });
    }
  }
}

template <class T, class A>
Levels<T, A> levels_of(const std::vector<at::Tensor>& maps, at::ArrayRef<double> scales) {
  Levels<T, A> levels = {};
  for (size_t i = 0; i < maps.size(); ++i) {
    levels.data[i] = static_cast<T*>(maps[i].data_ptr());
    levels.scale[i] = static_cast<A>(scales[i]);
    levels.height[i] = static_cast<int>(maps[i].size(2));
    levels.width[i] = static_cast<int>(maps[i].size(3));
  }
  return levels;
}

dim3 grid_of(const char* op, int64_t count, int64_t channels) {
  TORCH_CHECK(channels <= int64_t(kChannels) * 65535, op, ": features have too many channels");
  return dim3(
      static_cast<unsigned>(count), static_cast<unsigned>((channels + kChannels - 1) / kChannels));
}

}  // namespace

at::Tensor pyramid_roi_align_cuda(
    at::TensorList features, const at::Tensor& rois, at::ArrayRef<double> scales, int64_t out_h,
    int64_t out_w, int64_t sampling_ratio, int64_t average, double canonical_size,
    int64_t canonical_level) {
  const char* op = "pyramid_roi_align";
  TORCH_CHECK(!features.empty(), op, ": features must not be empty");
  const at::Tensor& first = features[0];
  check_pyramid(
      op, static_cast<int64_t>(features.size()), rois, first, scales, out_h, out_w,
      sampling_ratio, average, canonical_size);
  check_pyramid_features(op, features);
  const c10::cuda::CUDAGuard guard(first.device());
  const auto layout = layout_of(first);
  const bool last = layout == at::MemoryFormat::ChannelsLast;
  std::vector<at::Tensor> data;
  for (const at::Tensor& feature : features) data.push_back(feature.contiguous(layout));
  const AlignShape shape = {
      first.size(0), first.size(1), rois.size(0), static_cast<int>(features.size()),
      static_cast<int>(out_h), static_cast<int>(out_w), static_cast<int>(sampling_ratio),
      static_cast<int>(average)};
  const at::Tensor output = at::empty(
      {shape.count, shape.channels, out_h, out_w}, data[0].options().memory_format(layout));
  if (output.numel() == 0) return output;
  const at::Tensor boxes = rois.to(accumulate_type(first)).contiguous();
  const at::Tensor numbers = pyramid_levels(rois, scales, canonical_size, canonical_level);
  const dim3 grid = grid_of(op, shape.count, shape.channels);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch(first.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const auto kernel = last ? align_forward<T, true> : align_forward<T, false>;
    kernel<<<grid, kThreads, 0, stream>>>(
        levels_of<const T, A>(data, scales), boxes.const_data_ptr<A>(),
        numbers.const_data_ptr<int>(), shape, output.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

std::vector<at::Tensor> pyramid_roi_align_backward_cuda(
    const at::Tensor& grad, const at::Tensor& rois, at::IntArrayRef sizes,
    at::ArrayRef<double> scales, bool channels_last, int64_t sampling_ratio, int64_t average,
    double canonical_size, int64_t canonical_level) {
  const char* op = "pyramid_roi_align_backward";
  check_pyramid_gradient(op, grad, rois, sizes);
  const int64_t levels = static_cast<int64_t>(sizes.size()) / 2 - 1;
  check_pyramid(
      op, levels, rois, grad, scales, grad.size(2), grad.size(3), sampling_ratio, average,
      canonical_size);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto layout =
      channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto type = accumulate_type(grad);
  const at::Tensor upstream = grad.contiguous(at::MemoryFormat::ChannelsLast);
  std::vector<at::Tensor> gradients;
  for (int64_t i = 0; i < levels; ++i) {
    const at::Tensor gradient = at::empty(
        {sizes[0], sizes[1], sizes[2 * i + 2], sizes[2 * i + 3]},
        grad.options().dtype(type).memory_format(at::MemoryFormat::ChannelsLast));
    gradients.push_back(gradient.zero_());
  }
  const AlignShape shape = {
      sizes[0], sizes[1], rois.size(0), static_cast<int>(levels), static_cast<int>(grad.size(2)),
      static_cast<int>(grad.size(3)), static_cast<int>(sampling_ratio), static_cast<int>(average)};
  if (grad.numel() > 0 && shape.batch > 0) {
    const at::Tensor boxes = rois.to(type).contiguous();
    const at::Tensor numbers = pyramid_levels(rois, scales, canonical_size, canonical_level);
    const bool ordered = at::globalContext().deterministicAlgorithms();
    const dim3 grid = grid_of(op, ordered ? shape.batch * levels : shape.count, shape.channels);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    dispatch(grad.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const auto kernel = ordered ? align_backward_ordered<T> : align_backward<T>;
      kernel<<<grid, ordered ? kChannels : kThreads, 0, stream>>>(
          upstream.const_data_ptr<T>(), boxes.const_data_ptr<A>(), numbers.const_data_ptr<int>(),
          shape, levels_of<A, A>(gradients, scales));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  for (at::Tensor& gradient : gradients) {
    gradient = gradient.to(grad.scalar_type(), false, false, layout).contiguous(layout);
  }
  return gradients;
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("pyramid_roi_align", &pyramid_roi_align_cuda);
  library.impl("pyramid_roi_align_backward", &pyramid_roi_align_backward_cuda);
}

}  // namespace d2ext
