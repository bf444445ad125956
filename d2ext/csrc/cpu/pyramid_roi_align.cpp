// Pyramid RoI align on the CPU: all boxes of all levels in one call. Channels are taken in blocks of
// sixteen; the boxes of a level come from top to bottom, and the rows that they read pass through a ring
// of [cell][16] rows that stays in cache. The gradient of a level leaves such a ring row by row, each
// element written once. The order of additions depends on the boxes alone, so results do not depend on
// the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "pyramid_core.h"

namespace d2ext {
namespace {

D2EXT_CLONES void run_forward(const PyramidTask<float>& task) {
  forward_boxes(task);
}
D2EXT_CLONES void run_forward(const PyramidTask<double>& task) {
  forward_boxes(task);
}
D2EXT_CLONES void run_backward(const PyramidTask<float>& task) {
  backward_boxes(task);
}
D2EXT_CLONES void run_backward(const PyramidTask<double>& task) {
  backward_boxes(task);
}

struct Geometry {
  std::vector<double> scales;
  int out_h, out_w, sampling, average;
  double canonical_size;
  int64_t canonical_level;
};

struct Pyramid {
  int64_t batch, channels;
  std::vector<std::pair<int, int>> sizes;  // height, width
  bool last;                               // channels_last

  int64_t blocks() const {
    return (channels + kLanes - 1) / kLanes;
  }
  int64_t levels() const {
    return static_cast<int64_t>(sizes.size());
  }
};

bool empty(const std::pair<int, int>& size) {
  return size.first == 0 || size.second == 0;
}

template <class T>
struct Plan {
  Taps<T> taps;
  std::vector<LevelPlan<T>> levels;  // image by image
  std::vector<int64_t> dead;         // rows that read nothing
};

// Let spans cover whole vectors where the level is wide enough, and order the boxes.
template <class T>
void finish(LevelPlan<T>& level) {
  for (CellRange& span : level.spans) {
    if (span.last == span.first || span.last - span.first >= 8 || level.width < 8) continue;
    span.first = std::min(span.first, level.width - 8);
    span.last = span.first + 8;
  }
  std::stable_sort(
      level.boxes.begin(), level.boxes.end(),
      [](const BoxPlan& a, const BoxPlan& b) { return a.top < b.top; });
}

template <class T>
Plan<T> make_plan(
    const at::Tensor& rois, const Pyramid& pyramid, const Geometry& geometry, bool backward) {
  const int64_t count = rois.size(0), levels = pyramid.levels();
  const at::Tensor numbers =
      pyramid_levels(rois, geometry.scales, geometry.canonical_size, geometry.canonical_level);
  const at::Tensor boxes = rois.to(sizeof(T) == 8 ? at::kDouble : at::kFloat).contiguous();
  const int* level_of = numbers.const_data_ptr<int>();
  const T* rows = boxes.template const_data_ptr<T>();
  Plan<T> plan;
  plan.levels.resize(pyramid.batch * levels);
  for (int64_t i = 0; i < pyramid.batch * levels; ++i) {
    std::tie(plan.levels[i].height, plan.levels[i].width) = pyramid.sizes[i % levels];
    plan.levels[i].spans.assign(plan.levels[i].height, CellRange{0, 0});
  }
  const int bins_h = geometry.out_h * geometry.average, bins_w = geometry.out_w * geometry.average;
  TapLists<T> by_row, by_column;
  std::vector<size_t> counts;
  for (int64_t n = 0; n < count; ++n) {
    const T* roi = rows + n * 5;
    const int64_t image = roi_image(roi, pyramid.batch);
    if (image < 0 || level_of[n] < 0 || empty(pyramid.sizes[level_of[n]])) {
      plan.dead.push_back(n);
      continue;
    }
    LevelPlan<T>& level = plan.levels[image * levels + level_of[n]];
    const T scale = static_cast<T>(geometry.scales[level_of[n]]);
    by_row.taps.clear(), by_row.first.assign(1, 0);
    by_column.taps.clear(), by_column.first.assign(1, 0);
    bin_taps(
        align_span(roi[2], roi[4], scale, bins_h, geometry.sampling), level.height, geometry.out_h,
        geometry.average, by_row);
    bin_taps(
        align_span(roi[1], roi[3], scale, bins_w, geometry.sampling), level.width, geometry.out_w,
        geometry.average, by_column);
    const CellRange y = cells_of(by_row), x = cells_of(by_column);
    if (y.first == y.last || x.first == x.last) {
      plan.dead.push_back(n);
      continue;
    }
    const BoxPlan box = {
        n, y.first, y.last, x.first, x.last, plan.taps.rows.first.size() - 1,
        plan.taps.columns.first.size() - 1};
    turn_around(by_row, y, geometry.out_w * kLanes, counts, plan.taps.rows);
    if (backward) {
      turn_around(by_column, x, kLanes, counts, plan.taps.columns);
    } else {
      const size_t base = plan.taps.columns.taps.size();
      for (const Tap<T>& tap : by_column.taps) {
        plan.taps.columns.taps.push_back({tap.at * kLanes, tap.weight});
      }
      for (size_t i = 1; i < by_column.first.size(); ++i) {
        plan.taps.columns.first.push_back(base + by_column.first[i]);
      }
    }
    level.ring = std::max(level.ring, box.bottom - box.top);
    for (int i = box.top; i < box.bottom; ++i) {
      const size_t list = box.rows + (i - box.top);
      if (plan.taps.rows.first[list] == plan.taps.rows.first[list + 1]) continue;
      CellRange& span = level.spans[i];
      if (span.first == span.last) span = {box.left, box.right};
      span.first = std::min(span.first, box.left);
      span.last = std::max(span.last, box.right);
    }
    level.boxes.push_back(box);
  }
  for (LevelPlan<T>& level : plan.levels) finish(level);
  return plan;
}

// Scratch memory of one thread, large enough for every level.
template <class T>
struct Memory {
  Scratch<T> ring, buffer, line;

  Memory(const Plan<T>& plan, const Geometry& geometry)
      : ring(ring_size(plan)),
        buffer(kLanes * size_t(geometry.out_h) * geometry.out_w),
        line(kLanes * size_t(geometry.out_w)) {}

  static size_t ring_size(const Plan<T>& plan) {
    size_t size = 0;
    for (const LevelPlan<T>& level : plan.levels) {
      size = std::max(size, size_t(level.ring) * level.width * kLanes);
    }
    return size;
  }
};

template <class T>
PyramidTask<T> base_task(
    const Plan<T>& plan, const Pyramid& pyramid, const Geometry& geometry,
    const Memory<T>& memory) {
  PyramidTask<T> task{};
  task.taps = &plan.taps;
  task.out_h = geometry.out_h;
  task.out_w = geometry.out_w;
  task.roi_stride = pyramid.channels * geometry.out_h * geometry.out_w;
  task.ring = memory.ring.get();
  task.buffer = memory.buffer.get();
  task.line = memory.line.get();
  return task;
}

template <class T>
void forward(
    const std::vector<at::Tensor>& features, const at::Tensor& rois, const at::Tensor& output,
    const Pyramid& pyramid, const Geometry& geometry) {
  const Plan<T> plan = make_plan<T>(rois, pyramid, geometry, false);
  T* to = output.mutable_data_ptr<T>();
  const int64_t bins = int64_t(geometry.out_h) * geometry.out_w, row = pyramid.channels * bins;
  for (const int64_t n : plan.dead) std::memset(to + n * row, 0, sizeof(T) * row);
  const int64_t blocks = pyramid.blocks(), levels = pyramid.levels();
  const int64_t splits =
      std::max<int64_t>(1, at::get_num_threads() / std::max<int64_t>(1, blocks * pyramid.batch));
  // one task: an image, a block of channels and a share of the boxes, level by level
  at::parallel_for(0, pyramid.batch * blocks * splits, 1, [&](int64_t begin, int64_t end) {
    const Memory<T> memory(plan, geometry);
    PyramidTask<T> task = base_task(plan, pyramid, geometry, memory);
    for (int64_t index = begin * levels; index < end * levels; ++index) {
      const int64_t level = index % levels, part = index / levels;
      const int64_t image = part / splits / blocks, channel = part / splits % blocks * kLanes;
      task.level = &plan.levels[image * levels + level];
      const size_t boxes = task.level->boxes.size(), split = part % splits;
      task.first_box = boxes * split / splits;
      task.last_box = boxes * (split + 1) / splits;
      if (task.first_box == task.last_box) continue;
      const int64_t cells = int64_t(task.level->height) * task.level->width;
      task.lanes = static_cast<int>(std::min<int64_t>(kLanes, pyramid.channels - channel));
      task.input = channel_view<const T>(
          features[level].const_data_ptr<T>(), pyramid.last, pyramid.channels, cells, image,
          channel);
      task.output = channel_view<T>(to, pyramid.last, pyramid.channels, bins, 0, channel);
      run_forward(task);
    }
  });
}

template <class T>
void backward(
    const at::Tensor& grad, const at::Tensor& rois, const std::vector<at::Tensor>& gradients,
    const Pyramid& pyramid, const Geometry& geometry) {
  const Plan<T> plan = make_plan<T>(rois, pyramid, geometry, true);
  const T* from = grad.const_data_ptr<T>();
  const bool grad_last = layout_of(grad) == at::MemoryFormat::ChannelsLast;
  const int64_t bins = int64_t(geometry.out_h) * geometry.out_w;
  const int64_t blocks = pyramid.blocks(), levels = pyramid.levels();
  at::parallel_for(0, pyramid.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    const Memory<T> memory(plan, geometry);
    PyramidTask<T> task = base_task(plan, pyramid, geometry, memory);
    for (int64_t index = begin * levels; index < end * levels; ++index) {
      const int64_t level = index % levels, part = index / levels;
      const int64_t image = part / blocks, channel = part % blocks * kLanes;
      task.level = &plan.levels[image * levels + level];
      task.first_box = 0;
      task.last_box = task.level->boxes.size();
      const int64_t cells = int64_t(task.level->height) * task.level->width;
      task.lanes = static_cast<int>(std::min<int64_t>(kLanes, pyramid.channels - channel));
      task.grad = channel_view<const T>(from, grad_last, pyramid.channels, bins, 0, channel);
      task.input_grad = channel_view<T>(
          gradients[level].mutable_data_ptr<T>(), pyramid.last, pyramid.channels, cells, image,
          channel);
      run_backward(task);
    }
  });
}

Geometry geometry_of(
    at::ArrayRef<double> scales, int64_t out_h, int64_t out_w, int64_t sampling_ratio,
    int64_t average, double canonical_size, int64_t canonical_level) {
  return {
      scales.vec(), static_cast<int>(out_h), static_cast<int>(out_w),
      static_cast<int>(sampling_ratio), static_cast<int>(average), canonical_size,
      canonical_level};
}

}  // namespace

at::Tensor pyramid_roi_align_cpu(
    at::TensorList features, const at::Tensor& rois, at::ArrayRef<double> scales, int64_t out_h,
    int64_t out_w, int64_t sampling_ratio, int64_t average, double canonical_size,
    int64_t canonical_level) {
  const char* op = "pyramid_roi_align";
  TORCH_CHECK(!features.empty(), op, ": features must not be empty");
  check_pyramid(
      op, static_cast<int64_t>(features.size()), rois, features[0], scales, out_h, out_w,
      sampling_ratio, average, canonical_size);
  check_pyramid_features(op, features);
  const at::Tensor& first = features[0];
  const auto layout = layout_of(first);
  const auto type = accumulate_type(first);
  std::vector<at::Tensor> data;
  std::vector<std::pair<int, int>> sizes;
  for (const at::Tensor& feature : features) {
    data.push_back(feature.to(type).contiguous(layout));
    sizes.emplace_back(feature.size(2), feature.size(3));
  }
  const Pyramid pyramid = {
      first.size(0), first.size(1), sizes, layout == at::MemoryFormat::ChannelsLast};
  const Geometry geometry = geometry_of(
      scales, out_h, out_w, sampling_ratio, average, canonical_size, canonical_level);
  const at::Tensor output = at::empty(
      {rois.size(0), first.size(1), out_h, out_w}, data[0].options().memory_format(layout));
  if (output.numel() > 0) {
    if (type == at::kDouble) {
      forward<double>(data, rois, output, pyramid, geometry);
    } else {
      forward<float>(data, rois, output, pyramid, geometry);
    }
  }
  return is_half(first) ? output.to(first.scalar_type()) : output;
}

std::vector<at::Tensor> pyramid_roi_align_backward_cpu(
    const at::Tensor& grad, const at::Tensor& rois, at::IntArrayRef sizes,
    at::ArrayRef<double> scales, bool channels_last, int64_t sampling_ratio, int64_t average,
    double canonical_size, int64_t canonical_level) {
  const char* op = "pyramid_roi_align_backward";
  check_pyramid_gradient(op, grad, rois, sizes);
  check_pyramid(
      op, static_cast<int64_t>(sizes.size()) / 2 - 1, rois, grad, scales, grad.size(2),
      grad.size(3), sampling_ratio, average, canonical_size);
  const auto layout =
      channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto type = accumulate_type(grad);
  const at::Tensor upstream = grad.to(type).contiguous(layout_of(grad));
  std::vector<std::pair<int, int>> shapes;
  for (size_t i = 2; i < sizes.size(); i += 2) shapes.emplace_back(sizes[i], sizes[i + 1]);
  const Pyramid pyramid = {sizes[0], sizes[1], shapes, channels_last};
  const Geometry geometry = geometry_of(
      scales, grad.size(2), grad.size(3), sampling_ratio, average, canonical_size,
      canonical_level);
  std::vector<at::Tensor> gradients;
  for (const auto& [height, width] : shapes) {
    gradients.push_back(at::empty(
        {sizes[0], sizes[1], height, width}, upstream.options().memory_format(layout)));
    if (grad.numel() == 0) gradients.back().zero_();
  }
  if (grad.numel() > 0) {
    if (type == at::kDouble) {
      backward<double>(upstream, rois, gradients, pyramid, geometry);
    } else {
      backward<float>(upstream, rois, gradients, pyramid, geometry);
    }
  }
  for (at::Tensor& gradient : gradients) gradient = gradient.to(grad.scalar_type());
  return gradients;
}

TORCH_LIBRARY_IMPL(d2ext, CPU, library) {
  library.impl("pyramid_roi_align", &pyramid_roi_align_cpu);
  library.impl("pyramid_roi_align_backward", &pyramid_roi_align_backward_cpu);
}

}  // namespace d2ext
