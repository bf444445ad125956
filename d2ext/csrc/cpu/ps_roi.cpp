// Position-sensitive assembly and its mean on the CPU. The forward pass is split by RoI and map, the
// backward pass by map, whose planes one task owns: results do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ps_bins.h"

namespace d2ext {
namespace {

template <class T>
void assemble(
    const T* input, at::IntArrayRef shape, const PsPlan& plan, const PsGeometry& geometry,
    int64_t count, bool mean, T* output) {
  const int64_t cells = shape[2] * shape[3], width = shape[3];
  const int group = geometry.group_size, size = geometry.out_size;
  const int64_t maps = shape[1] / (group * group), bins = int64_t(size) * size;
  at::parallel_for(0, count * maps, 16, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / maps, map = index % maps;
      T* to = output + index * (mean ? 1 : bins);
      if (plan.image[n] < 0) {
        std::fill(to, to + (mean ? 1 : bins), T(0));
        continue;
      }
      const T* planes = input + (plan.image[n] * shape[1] + map * group * group) * cells;
      const CellRange* rows = plan.rows.data() + n * size;
      const CellRange* columns = plan.columns.data() + n * size;
      T total = T(0);
      for (int i = 0; i < size; ++i) {
        const T* row_planes = planes + int64_t(plan.part[i]) * group * cells;
        for (int j = 0; j < size; ++j) {
          const T value = bin_mean(row_planes + plan.part[j] * cells, width, rows[i], columns[j]);
          if (mean) {
            total += value;
          } else {
            to[i * size + j] = value;
          }
        }
      }
      if (mean) *to = total / static_cast<T>(bins);
    }
  });
}

template <class T>
void spread(
    const T* grad, at::IntArrayRef shape, const PsPlan& plan, const PsGeometry& geometry,
    bool mean, T* input_grad) {
  const int64_t cells = shape[2] * shape[3], width = shape[3];
  const int group = geometry.group_size, size = geometry.out_size;
  const int64_t maps = shape[1] / (group * group), bins = int64_t(size) * size;
  at::parallel_for(0, shape[0] * maps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / maps, map = index % maps;
      T* planes = input_grad + index * group * group * cells;
      std::fill(planes, planes + group * group * cells, T(0));
      for (const int64_t n : plan.by_image[image]) {
        const T* from = grad + (n * maps + map) * (mean ? 1 : bins);
        const CellRange* rows = plan.rows.data() + n * size;
        const CellRange* columns = plan.columns.data() + n * size;
        for (int i = 0; i < size; ++i) {
          T* row_planes = planes + int64_t(plan.part[i]) * group * cells;
          for (int j = 0; j < size; ++j) {
            const T value = mean ? *from / static_cast<T>(bins) : from[i * size + j];
            spread_bin(row_planes + plan.part[j] * cells, width, rows[i], columns[j], value);
          }
        }
      }
    }
  });
}

at::Tensor run_forward(
    const char* op, const at::Tensor& input, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, bool copy, bool legacy, bool mean) {
  check_ps(op, "input", input, rois, scale, group_size, out_size, 1);
  const PsGeometry geometry{
      scale, static_cast<int>(group_size), static_cast<int>(out_size), {copy, legacy}};
  const int64_t count = rois.size(0), maps = input.size(1) / (group_size * group_size);
  const at::Tensor data = input.to(accumulate_type(input)).contiguous();
  std::vector<int64_t> shape{count, maps};
  if (!mean) shape.insert(shape.end(), {out_size, out_size});
  at::Tensor output = at::empty(shape, data.options().memory_format(at::MemoryFormat::Contiguous));
  if (output.numel() > 0 && data.numel() == 0) {
    output.zero_();
  } else if (output.numel() > 0) {
    const PsPlan plan(rois, input.sizes(), geometry);
    if (data.scalar_type() == at::kDouble) {
      assemble<double>(
          data.const_data_ptr<double>(), input.sizes(), plan, geometry, count, mean,
          output.mutable_data_ptr<double>());
    } else {
      assemble<float>(
          data.const_data_ptr<float>(), input.sizes(), plan, geometry, count, mean,
          output.mutable_data_ptr<float>());
    }
  }
  output = output.to(input.scalar_type());
  return mean ? output : output.contiguous(layout_of(input));
}

at::Tensor run_backward(
    const char* op, const at::Tensor& grad, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, at::IntArrayRef input_size, bool copy, bool legacy,
    bool mean) {
  check_floating(op, "grad", grad, mean ? 2 : 4);
  check_ps_gradient(op, grad, rois, scale, group_size, out_size, input_size);
  const PsGeometry geometry{
      scale, static_cast<int>(group_size), static_cast<int>(out_size), {copy, legacy}};
  const at::Tensor upstream = grad.to(accumulate_type(grad)).contiguous();
  at::Tensor input_grad = at::empty(
      input_size, upstream.options().memory_format(at::MemoryFormat::Contiguous));
  if (input_grad.numel() > 0) {
    const PsPlan plan(rois, input_size, geometry);
    if (upstream.scalar_type() == at::kDouble) {
      spread<double>(
          upstream.const_data_ptr<double>(), input_size, plan, geometry, mean,
          input_grad.mutable_data_ptr<double>());
    } else {
      spread<float>(
          upstream.const_data_ptr<float>(), input_size, plan, geometry, mean,
          input_grad.mutable_data_ptr<float>());
    }
  }
  return input_grad.to(grad.scalar_type());
}

}  // namespace

at::Tensor ps_roi_assemble_cpu(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, bool copy, bool legacy) {
  return run_forward(
      "ps_roi_assemble", input, rois, spatial_scale, group_size, out_size, copy, legacy, false);
}

at::Tensor ps_roi_assemble_backward_cpu(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    at::IntArrayRef input_size, bool copy, bool legacy) {
  const int64_t out_size = grad.dim() == 4 ? grad.size(2) : 0;
  return run_backward(
      "ps_roi_assemble", grad, rois, spatial_scale, group_size, out_size, input_size, copy,
      legacy, false);
}

at::Tensor ps_roi_mean_cpu(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, bool copy, bool legacy) {
  return run_forward(
      "ps_roi_mean", input, rois, spatial_scale, group_size, out_size, copy, legacy, true);
}

at::Tensor ps_roi_mean_backward_cpu(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, at::IntArrayRef input_size, bool copy, bool legacy) {
  return run_backward(
      "ps_roi_mean", grad, rois, spatial_scale, group_size, out_size, input_size, copy, legacy,
      true);
}

}  // namespace d2ext
