// RoI warp on CUDA: shapes, layouts and launches of the kernels. Under
// torch.use_deterministic_algorithms the backward pass takes the kernel without atomic additions.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "roi_warp_kernels.cuh"

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

// Call `run` with the kind as a compile-time constant.
template <class F>
void with_kind(Kind kind, const F& run) {
  switch (kind) {
    case Kind::kPoint: return run(std::integral_constant<Kind, Kind::kPoint>());
    case Kind::kPool: return run(std::integral_constant<Kind, Kind::kPool>());
    case Kind::kEdge: return run(std::integral_constant<Kind, Kind::kEdge>());
  }
}

at::Tensor run_forward(const at::Tensor& input, const at::Tensor& rois, const Geometry& geometry) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto layout = layout_of(input);
  const at::Tensor data = input.contiguous(layout);
  const at::Tensor boxes = rois.to(accumulate_type(input)).contiguous();
  const WarpShape& shape = geometry.shape;
  at::Tensor output = at::empty(
      {shape.count, shape.channels, shape.out_h, shape.out_w},
      data.options().memory_format(layout));
  if (output.numel() == 0) return output;
  if (data.numel() == 0) return output.zero_();
  const dim3 grid(
      static_cast<unsigned>(shape.count),
      static_cast<unsigned>((shape.channels + kChannels - 1) / kChannels));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool last = layout == at::MemoryFormat::ChannelsLast;
  dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    with_kind(geometry.kind, [&](auto kind) {
      constexpr Kind kKind = decltype(kind)::value;
      const auto kernel = last ? warp_forward<T, kKind, true> : warp_forward<T, kKind, false>;
      kernel<<<grid, kThreads, table_bytes<A>(geometry), stream>>>(
          data.const_data_ptr<T>(), boxes.const_data_ptr<A>(), static_cast<A>(geometry.scale),
          shape, output.mutable_data_ptr<T>());
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
  const auto last = at::MemoryFormat::ChannelsLast;
  const at::Tensor data = input.contiguous(last), upstream = grad.contiguous(last);
  const at::Tensor boxes = rois.to(type).contiguous();
  const auto options = data.options().dtype(type).memory_format(std::nullopt);
  const bool empty =
      grad.numel() == 0 || data.numel() == 0 || (!need_input && !need_rois);  // nothing to launch
  const bool ordered = need_input && at::globalContext().deterministicAlgorithms();
  const int64_t blocks = (shape.channels + kChannels - 1) / kChannels;
  // (B, H, W, C) in memory
  at::Tensor input_grad, rois_grad, partial;
  if (need_input) {
    input_grad = at::zeros({shape.batch, shape.height, shape.width, shape.channels}, options);
  }
  if (need_rois) rois_grad = at::zeros({shape.count, 5}, options);
  if (need_rois && !empty) partial = at::empty({blocks, shape.count, 4}, options);
  if (!empty) {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    dispatch(input.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      with_kind(geometry.kind, [&](auto kind) {
        constexpr Kind kKind = decltype(kind)::value;
        const size_t bytes = table_bytes<A>(geometry);
        const A scale = static_cast<A>(geometry.scale);
        if (ordered) {
          const int segments = static_cast<int>(std::min<int64_t>(kSegments, shape.count));
          const int64_t size = input_grad.numel();
          const at::Tensor maps = at::zeros({segments, size}, options);
          const dim3 grid(segments, static_cast<unsigned>(blocks));
          warp_backward_ordered<T, kKind><<<grid, kChannels, bytes, stream>>>(
              upstream.const_data_ptr<T>(), data.const_data_ptr<T>(), boxes.const_data_ptr<A>(),
              scale, shape, segments, maps.mutable_data_ptr<A>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
          sum_segments<A><<<static_cast<unsigned>(blocks_for(size)), kThreads, 0, stream>>>(
              maps.const_data_ptr<A>(), segments, size, input_grad.mutable_data_ptr<A>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        }
        if (!ordered || need_rois) {
          const dim3 grid(static_cast<unsigned>(shape.count), static_cast<unsigned>(blocks));
          warp_backward<T, kKind><<<grid, kThreads, bytes, stream>>>(
              upstream.const_data_ptr<T>(), data.const_data_ptr<T>(), boxes.const_data_ptr<A>(),
              scale, shape,
              need_input && !ordered ? input_grad.mutable_data_ptr<A>() : nullptr,
              need_rois ? partial.mutable_data_ptr<A>() : nullptr);
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        }
        if (need_rois) {
          sum_boxes<A><<<static_cast<unsigned>(blocks_for(shape.count * 5)), kThreads, 0, stream>>>(
              partial.const_data_ptr<A>(), blocks, shape.count, rois_grad.mutable_data_ptr<A>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        }
      });
    });
  }
  at::Tensor by_input = at::empty({0}, input.options());
  if (need_input) {
    by_input =
        input_grad.to(input.scalar_type()).permute({0, 3, 1, 2}).contiguous(layout_of(input));
  }
  return {by_input, need_rois ? rois_grad.to(rois.scalar_type()) : at::empty({0}, rois.options())};
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
