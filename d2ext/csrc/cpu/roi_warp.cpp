// RoI warp on the CPU. Channels are taken in blocks of sixteen: a block of one image is copied to a
// [cell][16] tile that stays in cache while all RoIs of the image pass over it. A block is never split
// in the backward pass and its RoIs come in order, so results do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "warp_core.h"

namespace d2ext {
namespace {

D2EXT_CLONES void run_forward(const WarpTask<float>& task) {
  forward_task(task);
}
D2EXT_CLONES void run_forward(const WarpTask<double>& task) {
  forward_task(task);
}
D2EXT_CLONES void run_backward_both(const WarpTask<float>& task) {
  backward_task<float, true, true>(task);
}
D2EXT_CLONES void run_backward_input(const WarpTask<float>& task) {
  backward_task<float, true, false>(task);
}
D2EXT_CLONES void run_backward_rois(const WarpTask<float>& task) {
  backward_task<float, false, true>(task);
}
void run_backward_both(const WarpTask<double>& task) {
  backward_task<double, true, true>(task);
}
void run_backward_input(const WarpTask<double>& task) {
  backward_task<double, true, false>(task);
}
void run_backward_rois(const WarpTask<double>& task) {
  backward_task<double, false, true>(task);
}

struct Geometry {
  const char* op;
  double scale;
  int out_h, out_w;
  WarpRule rule;
  WarpKind kind;
};

int pool_of(const Geometry& geometry) {
  return geometry.kind == WarpKind::kPool ? 2 : 1;
}

// Samples of all RoIs, and the RoIs of each image.
template <class T>
struct Plan {
  std::vector<TileSample<T>> samples;
  std::vector<RoiSamples<T>> rois;
  std::vector<std::vector<int64_t>> by_image;
  std::vector<int64_t> dead;  // rows that take no part
};

template <class T>
void add_axis(
    std::vector<TileSample<T>>& samples, T low, T high, int length, int bins, int cell_step,
    const Geometry& geometry, int& count) {
  const T scale = static_cast<T>(geometry.scale);
  const int pool = pool_of(geometry), places = bins * pool;
  const WarpSpan<T> span = warp_span(low, high, scale, length, places, geometry.rule);
  const int per_place = span.steps + 1;
  count = per_place * pool;
  for (int place = 0; place < places; ++place) {
    for (int sub = 0; sub < per_place; ++sub) {
      const WarpSample<T> sample =
          warp_sample(span, place, sub, length, places, geometry.rule);
      samples.push_back(
          {std::max(sample.cell0, 0) * cell_step, sample.cell1 * cell_step, sample.weight0,
           sample.weight1, sample.slope0, sample.slope1, scale * (T(1) - sample.part),
           scale * sample.part, sample.valid()});
    }
  }
}

template <class T>
Plan<T> make_plan(const at::Tensor& input, const at::Tensor& rois, const Geometry& geometry) {
  const int64_t count = rois.size(0), batch = input.size(0);
  const int height = static_cast<int>(input.size(2)), width = static_cast<int>(input.size(3));
  Plan<T> plan;
  plan.by_image.resize(batch);
  plan.rois.resize(count);
  plan.samples.reserve(count * (geometry.out_h + geometry.out_w) * pool_of(geometry));
  std::vector<size_t> first(count, 0);
  const T* rows = rois.const_data_ptr<T>();
  for (int64_t n = 0; n < count; ++n) {
    const T* roi = rows + n * 5;
    const int64_t image = height > 0 && width > 0 ? roi_image(roi, batch) : -1;
    if (image < 0) {
      plan.dead.push_back(n);
      continue;
    }
    plan.by_image[image].push_back(n);
    first[n] = plan.samples.size();
    add_axis(
        plan.samples, roi[2], roi[4], height, geometry.out_h, width * kLanes, geometry,
        plan.rois[n].row_count);
    add_axis(
        plan.samples, roi[1], roi[3], width, geometry.out_w, kLanes, geometry,
        plan.rois[n].column_count);
  }
  for (int64_t n = 0; n < count; ++n) {
    plan.rois[n].rows = plan.samples.data() + first[n];
    plan.rois[n].columns =
        plan.rois[n].rows + int64_t(geometry.out_h) * plan.rois[n].row_count;
  }
  return plan;
}

// One block of channels of a tensor (M, C, h, w), of row `index`.
template <class T, class Data>
ChannelView<T> view_of(Data* data, const at::Tensor& like, int64_t index, int64_t channel) {
  const bool last = layout_of(like) == at::MemoryFormat::ChannelsLast;
  return channel_view<T>(data, last, like.size(1), like.size(2) * like.size(3), index, channel);
}

template <class T>
void zero_rows(T* data, int64_t row, const std::vector<int64_t>& rows) {
  for (const int64_t n : rows) std::memset(data + n * row, 0, sizeof(T) * row);
}

template <class T>
WarpTask<T> base_task(const at::Tensor& input, const Geometry& geometry, const Plan<T>& plan) {
  WarpTask<T> task{};
  task.size = {
      geometry.out_h, geometry.out_w, geometry.rule.edge, input.size(2) * input.size(3)};
  task.kind = geometry.kind;
  task.samples = plan.rois.data();
  task.roi_stride = input.size(1) * geometry.out_h * geometry.out_w;
  return task;
}

template <class T>
void forward(
    const at::Tensor& input, const at::Tensor& rois, const at::Tensor& output,
    const Geometry& geometry) {
  const Plan<T> plan = make_plan<T>(input, rois, geometry);
  const T* from = input.const_data_ptr<T>();
  T* to = output.mutable_data_ptr<T>();
  const int64_t channels = input.size(1), blocks = (channels + kLanes - 1) / kLanes;
  const WarpTask<T> base = base_task<T>(input, geometry, plan);
  zero_rows(to, base.roi_stride, plan.dead);
  const int64_t splits =
      std::max<int64_t>(1, at::get_num_threads() / std::max<int64_t>(1, blocks * input.size(0)));
  at::parallel_for(0, input.size(0) * blocks * splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> tile(kLanes * base.size.cells);
    const Scratch<T> buffer(kLanes * size_t(geometry.out_h) * geometry.out_w);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / splits / blocks, channel = index / splits % blocks * kLanes;
      const auto& numbers = plan.by_image[image];
      const int64_t count = static_cast<int64_t>(numbers.size()), split = index % splits;
      const int64_t first = count * split / splits, last = count * (split + 1) / splits;
      if (first == last) continue;
      WarpTask<T> task = base;
      task.lanes = static_cast<int>(std::min<int64_t>(kLanes, channels - channel));
      task.input = view_of<const T>(from, input, image, channel);
      task.output = view_of<T>(to, output, 0, channel);
      task.rois = numbers.data() + first;
      task.roi_count = last - first;
      task.tile = tile.get();
      task.buffer = buffer.get();
      run_forward(task);
    }
  });
}

template <class T>
void backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    const at::Tensor& input_grad, const at::Tensor& rois_grad, const Geometry& geometry) {
  const Plan<T> plan = make_plan<T>(input, rois, geometry);
  const bool need_input = input_grad.defined(), need_rois = rois_grad.defined();
  const T* from = input.const_data_ptr<T>();
  const T* upstream = grad.const_data_ptr<T>();
  T* to = need_input ? input_grad.mutable_data_ptr<T>() : nullptr;
  const int64_t channels = input.size(1), blocks = (channels + kLanes - 1) / kLanes;
  const int64_t count = rois.size(0);
  const WarpTask<T> base = base_task<T>(input, geometry, plan);
  std::vector<T> partial(need_rois ? blocks * count * 4 : 0, T(0));
  at::parallel_for(0, input.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> tile(kLanes * base.size.cells);
    const Scratch<T> tile_grad(need_input ? kLanes * base.size.cells : 0);
    const Scratch<T> buffer(kLanes * size_t(geometry.out_h) * geometry.out_w);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / blocks, block = index % blocks, channel = block * kLanes;
      const auto& numbers = plan.by_image[image];
      if (numbers.empty() && !need_input) continue;
      WarpTask<T> task = base;
      task.lanes = static_cast<int>(std::min<int64_t>(kLanes, channels - channel));
      task.input = view_of<const T>(from, input, image, channel);
      task.grad = view_of<const T>(upstream, grad, 0, channel);
      if (need_input) task.input_grad = view_of<T>(to, input_grad, image, channel);
      task.rois = numbers.data();
      task.roi_count = static_cast<int64_t>(numbers.size());
      task.box_grad = partial.data() + (need_rois ? block * count * 4 : 0);
      task.tile = tile.get();
      task.tile_grad = tile_grad.get();
      task.buffer = buffer.get();
      if (need_input && need_rois) {
        run_backward_both(task);
      } else if (need_input) {
        run_backward_input(task);
      } else {
        run_backward_rois(task);
      }
    }
  });
  if (!need_rois) return;
  T* sums = rois_grad.mutable_data_ptr<T>();
  for (int64_t n = 0; n < count; ++n) {
    sums[n * 5] = T(0);
    for (int i = 0; i < 4; ++i) {
      T sum = T(0);
      for (int64_t block = 0; block < blocks; ++block) sum += partial[(block * count + n) * 4 + i];
      sums[n * 5 + 1 + i] = sum;
    }
  }
}

at::Tensor warp_forward(
    const at::Tensor& input, const at::Tensor& rois, const Geometry& geometry) {
  const auto layout = layout_of(input);
  const auto type = accumulate_type(input);
  const at::Tensor data = input.to(type).contiguous(layout);
  const at::Tensor boxes = rois.to(type).contiguous();
  at::Tensor output = at::empty(
      {rois.size(0), input.size(1), geometry.out_h, geometry.out_w},
      data.options().memory_format(layout));
  if (output.numel() > 0) {
    if (data.numel() == 0) {
      output.zero_();
    } else if (type == at::kDouble) {
      forward<double>(data, boxes, output, geometry);
    } else {
      forward<float>(data, boxes, output, geometry);
    }
  }
  return is_half(input) ? output.to(input.scalar_type()) : output;
}

std::tuple<at::Tensor, at::Tensor> warp_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    const Geometry& geometry, bool need_input, bool need_rois) {
  check_warp_gradient(geometry.op, grad, input, rois, geometry.out_h, geometry.out_w);
  const auto layout = layout_of(input);
  const auto type = accumulate_type(input);
  const at::Tensor data = input.to(type).contiguous(layout);
  const at::Tensor upstream = grad.to(type).contiguous(layout_of(grad));
  const at::Tensor boxes = rois.to(type).contiguous();
  at::Tensor input_grad, rois_grad;
  if (need_input) input_grad = at::empty(input.sizes(), data.options().memory_format(layout));
  if (need_rois) rois_grad = at::empty(rois.sizes(), boxes.options());
  if (!need_input && !need_rois) {
    // nothing is asked for
  } else if (grad.numel() == 0 || data.numel() == 0) {
    if (need_input) input_grad.zero_();
    if (need_rois) rois_grad.zero_();
  } else if (type == at::kDouble) {
    backward<double>(upstream, data, boxes, input_grad, rois_grad, geometry);
  } else {
    backward<float>(upstream, data, boxes, input_grad, rois_grad, geometry);
  }
  return {
      need_input ? input_grad.to(input.scalar_type()) : at::empty({0}, input.options()),
      need_rois ? rois_grad.to(rois.scalar_type()) : at::empty({0}, rois.options())};
}

Geometry geometry_of(
    const char* op, const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h,
    int64_t out_w, WarpRule rule, WarpKind kind) {
  check_warp(op, input, rois, scale, out_h, out_w);
  return {op, scale, static_cast<int>(out_h), static_cast<int>(out_w), rule, kind};
}

Geometry warp_geometry(
    const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h, int64_t out_w,
    bool aligned, bool quantize, c10::string_view border, c10::string_view bin_reduce) {
  const WarpRule rule = warp_rule("roi_warp", aligned, quantize, border, bin_reduce);
  const WarpKind kind = rule.edge ? WarpKind::kEdge : WarpKind::kPoint;
  return geometry_of("roi_warp", input, rois, scale, out_h, out_w, rule, kind);
}

Geometry pool_geometry(
    const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h, int64_t out_w,
    bool aligned, bool quantize, c10::string_view border) {
  const char* op = "roi_warp_max_pool";
  const WarpRule rule = warp_rule(op, aligned, quantize, border, "point");
  return geometry_of(op, input, rois, scale, out_h, out_w, rule, WarpKind::kPool);
}

}  // namespace

at::Tensor roi_warp_cpu(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t out_h,
    int64_t out_w, bool aligned, bool quantize, c10::string_view border,
    c10::string_view bin_reduce) {
  return warp_forward(
      input, rois,
      warp_geometry(
          input, rois, spatial_scale, out_h, out_w, aligned, quantize, border, bin_reduce));
}

std::tuple<at::Tensor, at::Tensor> roi_warp_backward_cpu(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    double spatial_scale, int64_t out_h, int64_t out_w, bool aligned, bool quantize,
    c10::string_view border, c10::string_view bin_reduce, bool need_input, bool need_rois) {
  return warp_backward(
      grad, input, rois,
      warp_geometry(
          input, rois, spatial_scale, out_h, out_w, aligned, quantize, border, bin_reduce),
      need_input, need_rois);
}

at::Tensor roi_warp_max_pool_cpu(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t out_h,
    int64_t out_w, bool aligned, bool quantize, c10::string_view border) {
  return warp_forward(
      input, rois,
      pool_geometry(input, rois, spatial_scale, out_h, out_w, aligned, quantize, border));
}

std::tuple<at::Tensor, at::Tensor> roi_warp_max_pool_backward_cpu(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    double spatial_scale, int64_t out_h, int64_t out_w, bool aligned, bool quantize,
    c10::string_view border, bool need_input, bool need_rois) {
  return warp_backward(
      grad, input, rois,
      pool_geometry(input, rois, spatial_scale, out_h, out_w, aligned, quantize, border),
      need_input, need_rois);
}

TORCH_LIBRARY_IMPL(d2ext, CPU, library) {
  library.impl("roi_warp", &roi_warp_cpu);
  library.impl("roi_warp_backward", &roi_warp_backward_cpu);
  library.impl("roi_warp_max_pool", &roi_warp_max_pool_cpu);
  library.impl("roi_warp_max_pool_backward", &roi_warp_max_pool_backward_cpu);
}

}  // namespace d2ext
