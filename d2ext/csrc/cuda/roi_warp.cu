// RoI warp on CUDA: shapes, layouts and launches of the kernels. Both directions are deterministic.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "roi_warp_backward.cuh"
#include "roi_warp_planes.cuh"

namespace d2ext {
namespace {

struct Geometry {
  const char* op;
  double scale;
  Kind kind;
  WarpShape shape;
};

template <class A>
size_t table_bytes(const Geometry& geometry) {
  if (geometry.kind == Kind::kEdge) return 0;
  const int per_bin = geometry.kind == Kind::kPool ? 2 : 1;
  return sizeof(WarpSample<A>) * per_bin * (geometry.shape.out_h + geometry.shape.out_w);
}

template <Kind kKind, int kWidth>
struct Choice {
  static constexpr Kind kind = kKind;
  static constexpr int width = kWidth;
};

// Call `run` with the kind and the channels per access as compile-time constants: four where the
// rows of all tensors allow it, one for edge_max.
template <class F>
void with_choice(const Geometry& geometry, bool wide, const F& run) {
  switch (geometry.kind) {
    case Kind::kPoint:
      return wide ? run(Choice<Kind::kPoint, 4>()) : run(Choice<Kind::kPoint, 1>());
    case Kind::kPool:
      return wide ? run(Choice<Kind::kPool, 4>()) : run(Choice<Kind::kPool, 1>());
    case Kind::kEdge: return run(Choice<Kind::kEdge, 1>());
  }
}

// Whether four channels of a channels_last tensor may be read at once.
bool fits_four(const at::Tensor& tensor) {
  const int64_t bytes = std::min<int64_t>(4 * tensor.element_size(), 16);
  return tensor.size(1) % 4 == 0 &&
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

dim3 box_grid(const WarpShape& shape) {
  return dim3(
      static_cast<unsigned>(shape.count),
      static_cast<unsigned>((shape.channels + kGroups * kChannels - 1) / (kGroups * kChannels)));
}

// Map and output NCHW; `cut` has planes.
template <class T>
void forward_by_planes(
    const at::Tensor& input, const at::Tensor& boxes, const Geometry& geometry,
    const PlaneCut& cut, const at::Tensor& output) {
  using A = Accumulate<T>;
  const bool pool = geometry.kind == Kind::kPool, four = cut.planes == 4;
  const auto kernel = pool
      ? (four ? planes_forward<T, Kind::kPool, 4> : planes_forward<T, Kind::kPool, 2>)
      : (four ? planes_forward<T, Kind::kPoint, 4> : planes_forward<T, Kind::kPoint, 2>);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  kernel<<<static_cast<unsigned>(cut.blocks), cut.threads, cut.bytes, stream>>>(
      input.const_data_ptr<T>(), boxes.const_data_ptr<A>(), static_cast<A>(geometry.scale),
      geometry.shape, cut, output.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor run_forward(const at::Tensor& input, const at::Tensor& rois, const Geometry& geometry) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto layout = layout_of(input);
  const WarpShape& shape = geometry.shape;
  at::Tensor output = at::empty(
      {shape.count, shape.channels, shape.out_h, shape.out_w},
      input.options().memory_format(layout));
  if (output.numel() == 0) return output;
  if (input.numel() == 0) return output.zero_();
  const at::Tensor boxes = rois.to(accumulate_type(input)).contiguous();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool last = layout == at::MemoryFormat::ChannelsLast;
  dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    if (!last && geometry.kind != Kind::kEdge) {
      const PlaneCut cut = plane_cut(shape, sizeof(T), table_bytes<A>(geometry));
      if (cut.planes > 0) {
        return forward_by_planes<T>(input.contiguous(), boxes, geometry, cut, output);
      }
    }
    const at::Tensor data = input.contiguous(at::MemoryFormat::ChannelsLast);
    with_choice(geometry, fits_four(data), [&](auto choice) {
      using C = decltype(choice);
      const size_t bytes = table_bytes<A>(geometry);
      warp_forward<T, C::kind, C::width><<<box_grid(shape), kThreads, bytes, stream>>>(
          data.const_data_ptr<T>(), boxes.const_data_ptr<A>(), static_cast<A>(geometry.scale),
          shape, last, output.mutable_data_ptr<T>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> run_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    const Geometry& geometry, bool need_input, bool need_rois) {
  const WarpShape& shape = geometry.shape;
  check_warp_gradient(geometry.op, grad, input, rois, shape.out_h, shape.out_w);
  const c10::cuda::CUDAGuard guard(input.device());
  const auto type = accumulate_type(input);
  const auto channels_last = at::MemoryFormat::ChannelsLast;
  at::Tensor by_input = at::empty({0}, input.options()), by_rois = at::empty({0}, rois.options());
  if (need_input) {
    by_input = at::empty(input.sizes(), input.options().memory_format(channels_last));
  }
  const auto floats = rois.options().dtype(type);
  if (need_rois) by_rois = at::empty({shape.count, 5}, floats);
  if (grad.numel() == 0 || input.numel() == 0 || (!need_input && !need_rois)) {
    if (need_input) by_input = by_input.zero_().contiguous(layout_of(input));
    if (need_rois) by_rois = by_rois.zero_().to(rois.scalar_type());
    return {by_input, by_rois};
  }
  const bool last = layout_of(grad) == channels_last;
  const at::Tensor upstream = grad.contiguous(layout_of(grad));
  const at::Tensor data = input.contiguous(channels_last);
  const at::Tensor boxes = rois.to(type).contiguous();
  const bool choosing = geometry.kind != Kind::kPoint && need_input;
  const bool wide = fits_four(data) && (!last || fits_four(upstream));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    with_choice(geometry, wide, [&](auto choice) {
      using C = decltype(choice);
      const size_t bytes = table_bytes<A>(geometry);
      const A scale = static_cast<A>(geometry.scale);
      const A* corners = boxes.const_data_ptr<A>();
      const T* rows = upstream.const_data_ptr<T>();  // (N, bins, C) for what gathers
      const dim3 grid = box_grid(shape);
      using Won = Winner<C::kind>;
      const Scratch<T> turned(data, !last && need_input ? grad.numel() : 0);
      const Scratch<Won> winners(data, choosing ? grad.numel() : 0);
      const Scratch<A> partial(data, need_rois ? int64_t(grid.y) * shape.count * 4 : 0);
      if (!last && need_input) rows = turned.get();
      Won* won = choosing ? winners.get() : nullptr;
      if ((!last && need_input) || choosing || need_rois) {
        warp_boxes<T, C::kind, C::width><<<grid, kThreads, bytes, stream>>>(
            upstream.const_data_ptr<T>(), data.const_data_ptr<T>(), corners, scale, shape, last,
            !last && need_input ? turned.get() : nullptr, won,
            need_rois ? partial.get() : nullptr);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (need_rois) {
        sum_boxes<A><<<static_cast<unsigned>(blocks_for(shape.count * 5)), kThreads, 0, stream>>>(
            partial.get(), grid.y, shape.count, by_rois.mutable_data_ptr<A>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (!need_input) return;
      using Tile = GatherTile<C::width>;
      const int64_t samples = table_bytes<A>(geometry) / sizeof(WarpSample<A>);
      const Scratch<AxisSample<A>> plan_samples(data, shape.count * samples);
      const Scratch<BinRange> plan_ranges(data, shape.count * (shape.height + shape.width));
      const Scratch<Reach> plan_reach(data, shape.count);
      const Plan<A> plan{plan_samples.get(), plan_ranges.get(), plan_reach.get()};
      warp_plan<A, C::kind><<<static_cast<unsigned>(shape.count), kThreads, 0, stream>>>(
          corners, scale, shape, plan);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      const int64_t tiles = shape.batch * ((shape.height + Tile::kHeight - 1) / Tile::kHeight) *
          ((shape.width + kTileWidth - 1) / kTileWidth);
      const dim3 cells(
          static_cast<unsigned>(tiles),
          static_cast<unsigned>((shape.channels + Tile::kChannels - 1) / Tile::kChannels));
      warp_gather<T, C::kind, C::width><<<cells, kThreads, 0, stream>>>(
          Gather<T>{rows, corners, scale, shape, plan}, won, by_input.mutable_data_ptr<T>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  if (need_input) by_input = by_input.contiguous(layout_of(input));
  return {by_input, need_rois ? by_rois.to(rois.scalar_type()) : by_rois};
}

Geometry geometry_of(
    const char* op, const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h,
    int64_t out_w, WarpRule rule, Kind kind) {
  check_warp(op, input, rois, scale, out_h, out_w);
  TORCH_CHECK(input.size(1) <= int64_t(kChannels) * 65535, op, ": input has too many channels");
  return {
      op, scale, kind,
      {input.size(0), input.size(1), rois.size(0), static_cast<int>(input.size(2)),
       static_cast<int>(input.size(3)), static_cast<int>(out_h), static_cast<int>(out_w), rule}};
}

Geometry warp_geometry(
    const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h, int64_t out_w,
    bool aligned, bool quantize, c10::string_view border, c10::string_view bin_reduce) {
  const WarpRule rule = warp_rule("roi_warp", aligned, quantize, border, bin_reduce);
  return geometry_of(
      "roi_warp", input, rois, scale, out_h, out_w, rule,
      rule.edge ? Kind::kEdge : Kind::kPoint);
}

Geometry pool_geometry(
    const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h, int64_t out_w,
    bool aligned, bool quantize, c10::string_view border) {
  const char* op = "roi_warp_max_pool";
  const WarpRule rule = warp_rule(op, aligned, quantize, border, "point");
  return geometry_of(op, input, rois, scale, out_h, out_w, rule, Kind::kPool);
}

}  // namespace

at::Tensor roi_warp_cuda(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t out_h,
    int64_t out_w, bool aligned, bool quantize, c10::string_view border,
    c10::string_view bin_reduce) {
  return run_forward(
      input, rois,
      warp_geometry(
          input, rois, spatial_scale, out_h, out_w, aligned, quantize, border, bin_reduce));
}

std::tuple<at::Tensor, at::Tensor> roi_warp_backward_cuda(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    double spatial_scale, int64_t out_h, int64_t out_w, bool aligned, bool quantize,
    c10::string_view border, c10::string_view bin_reduce, bool need_input, bool need_rois) {
  return run_backward(
      grad, input, rois,
      warp_geometry(
          input, rois, spatial_scale, out_h, out_w, aligned, quantize, border, bin_reduce),
      need_input, need_rois);
}

at::Tensor roi_warp_max_pool_cuda(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t out_h,
    int64_t out_w, bool aligned, bool quantize, c10::string_view border) {
  return run_forward(
      input, rois,
      pool_geometry(input, rois, spatial_scale, out_h, out_w, aligned, quantize, border));
}

std::tuple<at::Tensor, at::Tensor> roi_warp_max_pool_backward_cuda(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    double spatial_scale, int64_t out_h, int64_t out_w, bool aligned, bool quantize,
    c10::string_view border, bool need_input, bool need_rois) {
  return run_backward(
      grad, input, rois,
      pool_geometry(input, rois, spatial_scale, out_h, out_w, aligned, quantize, border),
      need_input, need_rois);
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("roi_warp", &roi_warp_cuda);
  library.impl("roi_warp_backward", &roi_warp_backward_cuda);
  library.impl("roi_warp_max_pool", &roi_warp_max_pool_cuda);
  library.impl("roi_warp_max_pool_backward", &roi_warp_max_pool_backward_cuda);
}

}  // namespace d2ext
