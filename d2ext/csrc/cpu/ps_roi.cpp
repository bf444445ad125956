// Position-sensitive assembly and its mean on the CPU. Assembly takes sixteen maps at a time; the
// backward pass is split by map, whose planes one task owns: results do not depend on the number of
// threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "pack.h"
#include "ps_bins.h"

namespace d2ext {
namespace {

// Sixteen maps of one image and one row of parts: the planes of the row's parts become [cell][16] tiles,
// each RoI fills a band of whole output rows.
template <class T>
struct BandTask {
  const PsPlan* plan;
  const T* planes;  // of the first map, at the first part of the row
  int64_t map_stride, out_stride;  // between maps of input and output
  int64_t roi_stride;              // between RoIs of the output
  int64_t cells;
  int group, size, width, lanes, part_row;
  const std::vector<int64_t>* rois;
  T* output;  // of RoI 0, first map
  T* tiles;   // scratch, group * cells * 16
  T* band;    // scratch, band rows * size * 16
};

template <class T>
D2EXT_INLINE void band_task(const BandTask<T>& task) {
  const PsPlan& plan = *task.plan;
  const T* planes[kLanes];
  for (int part = 0; part < task.group; ++part) {
    for (int lane = 0; lane < kLanes; ++lane) {
      planes[lane] =
          task.planes + (lane < task.lanes ? lane : 0) * task.map_stride + part * task.cells;
    }
    planes_to_tile(
        planes, task.lanes, static_cast<int>(task.cells), task.tiles + part * task.cells * kLanes);
  }
  const int first = plan.part_first[task.part_row], last = plan.part_first[task.part_row + 1];
  for (const int64_t n : *task.rois) {
    const CellRange* rows = plan.rows.data() + n * task.size;
    const CellRange* columns = plan.columns.data() + n * task.size;
    const double* row_share = plan.row_share.data() + n * task.size;
    const double* column_share = plan.column_share.data() + n * task.size;
    T* to = task.band;
    for (int i = first; i < last; ++i) {
      for (int j = 0; j < task.size; ++j, to += kLanes) {
        const T* tile = task.tiles + plan.part[j] * task.cells * kLanes;
        Pack<T> sum = Pack<T>::fill(T(0));
        for (int row = rows[i].first; row < rows[i].last; ++row) {
          const T* cell = tile + (int64_t(row) * task.width + columns[j].first) * kLanes;
          for (int x = columns[j].first; x < columns[j].last; ++x, cell += kLanes) {
            sum.add(Pack<T>::load(cell));
          }
        }
        sum.times(static_cast<T>(row_share[i]) * static_cast<T>(column_share[j])).store(to);
      }
    }
    T* outputs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      outputs[lane] = task.output + n * task.roi_stride +
          (lane < task.lanes ? lane : 0) * task.out_stride + int64_t(first) * task.size;
    }
    tile_to_planes(task.band, task.lanes, (last - first) * task.size, outputs);
  }
}

D2EXT_CLONES void run_band(const BandTask<float>& task) {
  band_task(task);
}
void run_band(const BandTask<double>& task) {
  band_task(task);
}

template <class T>
void assemble(
    const T* input, at::IntArrayRef shape, const PsPlan& plan, const PsGeometry& geometry,
    T* output) {
  const int group = geometry.group_size, size = geometry.out_size;
  const int64_t cells = shape[2] * shape[3], parts = int64_t(group) * group;
  const int64_t maps = shape[1] / parts, bins = int64_t(size) * size;
  const int64_t blocks = (maps + kLanes - 1) / kLanes;
  for (size_t n = 0; n < plan.image.size(); ++n) {
    if (plan.image[n] < 0) std::fill(output + n * maps * bins, output + (n + 1) * maps * bins, T(0));
  }
  int rows = 0;
  for (int part = 0; part < group; ++part) {
    rows = std::max(rows, plan.part_first[part + 1] - plan.part_first[part]);
  }
  at::parallel_for(0, shape[0] * blocks * group, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> tiles(group * cells * kLanes), band(size_t(rows) * size * kLanes);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / group / blocks, map = index / group % blocks * kLanes;
      BandTask<T> task;
      task.plan = &plan;
      task.part_row = static_cast<int>(index % group);
      task.planes =
          input + ((image * maps + map) * parts + int64_t(task.part_row) * group) * cells;
      task.map_stride = parts * cells;
      task.out_stride = bins;
      task.roi_stride = maps * bins;
      task.cells = cells;
      task.group = group;
      task.size = size;
      task.width = static_cast<int>(shape[3]);
      task.lanes = static_cast<int>(std::min<int64_t>(kLanes, maps - map));
      task.rois = &plan.by_image[image];
      task.output = output + map * bins;
      task.tiles = tiles.get();
      task.band = band.get();
      if (!task.rois->empty()) run_band(task);
    }
  });
}

template <class T>
void average(
    const T* input, at::IntArrayRef shape, const PsPlan& plan, const PsGeometry& geometry,
    int64_t count, T* output) {
  const int64_t cells = shape[2] * shape[3], width = shape[3];
  const int group = geometry.group_size, size = geometry.out_size;
  const int64_t maps = shape[1] / (group * group), bins = int64_t(size) * size;
  at::parallel_for(0, count * maps, 16, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / maps, map = index % maps;
      double total = 0.0;
      if (plan.image[n] >= 0) {
        const T* planes = input + (plan.image[n] * shape[1] + map * group * group) * cells;
        assemble_map(plan, n, group, size, width, cells, planes, [&](T value) { total += value; });
      }
      output[index] = static_cast<T>(total / static_cast<double>(bins));
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
        const auto add = [&](const PsRun& rows, const PsRun& columns, T* plane) {
          const double upstream = mean
              ? *from / static_cast<double>(bins) * (rows.share * columns.share)
              : run_sum(from, size, rows, columns) * (rows.each * columns.each);
          const T value = static_cast<T>(upstream);
          for (int row = rows.cells.first; row < rows.cells.last; ++row) {
            T* cell = plane + row * width;
            for (int x = columns.cells.first; x < columns.cells.last; ++x) cell[x] += value;
          }
        };
        over_runs(plan, n, group, size, cells, planes, add);
      }
    }
  });
}

template <class T>
void forward(
    const at::Tensor& input, const PsPlan& plan, const PsGeometry& geometry, bool mean,
    const at::Tensor& output) {
  const T* from = input.const_data_ptr<T>();
  T* to = output.mutable_data_ptr<T>();
  if (mean) {
    average(from, input.sizes(), plan, geometry, output.size(0), to);
  } else {
    assemble(from, input.sizes(), plan, geometry, to);
  }
}

at::Tensor run_forward(
    const char* op, const at::Tensor& input, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, bool inclusive, bool mean) {
  check_ps(op, "input", input, rois, scale, group_size, out_size, 1);
  const PsGeometry geometry{
      scale, static_cast<int>(group_size), static_cast<int>(out_size), {inclusive}};
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
      forward<double>(data, plan, geometry, mean, output);
    } else {
      forward<float>(data, plan, geometry, mean, output);
    }
  }
  output = output.to(input.scalar_type());
  return mean ? output : output.contiguous(layout_of(input));
}

at::Tensor run_backward(
    const char* op, const at::Tensor& grad, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, at::IntArrayRef input_size, bool inclusive,
    bool mean) {
  check_floating(op, "grad", grad, mean ? 2 : 4);
  check_ps_gradient(op, grad, rois, scale, group_size, out_size, input_size);
  const PsGeometry geometry{
      scale, static_cast<int>(group_size), static_cast<int>(out_size), {inclusive}};
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
    int64_t out_size, bool inclusive) {
  return run_forward(
      "ps_roi_assemble", input, rois, spatial_scale, group_size, out_size, inclusive, false);
}

at::Tensor ps_roi_assemble_backward_cpu(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    at::IntArrayRef input_size, bool inclusive) {
  const int64_t out_size = grad.dim() == 4 ? grad.size(2) : 0;
  return run_backward(
      "ps_roi_assemble", grad, rois, spatial_scale, group_size, out_size, input_size, inclusive, false);
}

at::Tensor ps_roi_mean_cpu(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, bool inclusive) {
  return run_forward(
      "ps_roi_mean", input, rois, spatial_scale, group_size, out_size, inclusive, true);
}

at::Tensor ps_roi_mean_backward_cpu(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, at::IntArrayRef input_size, bool inclusive) {
  return run_backward(
      "ps_roi_mean", grad, rois, spatial_scale, group_size, out_size, input_size, inclusive,
      true);
}

TORCH_LIBRARY_IMPL(d2ext, CPU, library) {
  library.impl("ps_roi_assemble", &ps_roi_assemble_cpu);
  library.impl("ps_roi_assemble_backward", &ps_roi_assemble_backward_cpu);
  library.impl("ps_roi_mean", &ps_roi_mean_cpu);
  library.impl("ps_roi_mean_backward", &ps_roi_mean_backward_cpu);
}

}  // namespace d2ext
