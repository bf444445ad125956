// FCIS' joint head on the CPU. A task takes one row of parts and eight classes: per part the sixteen
// planes (eight outside, eight inside) become a [cell][16] tile, over which all RoIs of the image pass.
// The assembled tensor never exists, and each plane is read and its gradient written once.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "pack.h"
#include "ps_bins.h"

namespace d2ext {
namespace {

constexpr int kClasses = kLanes / 2;

template <class T>
struct HeadTask {
  const PsPlan* plan;
  int64_t image;
  int part_row, group, size, width;
  int64_t cells, classes, first_class;
  const T* score;       // of the image
  T* score_grad;        // backward: of the image
  T* sums;              // forward: (N, 8) of this task
  const T* grad_cls;    // backward, may be null: (N, K)
  const T* grad_seg;    // backward, may be null: (N, 2, P, P)
  const int64_t* picked;
  T* tile;
  T* tile_grad;
};

template <class T>
D2EXT_INLINE Pack<T> bin_sum(const T* tile, int width, CellRange y, CellRange x) {
  Pack<T> sum = Pack<T>::fill(T(0));
  for (int row = y.first; row < y.last; ++row) {
    const T* cell = tile + (int64_t(row) * width + x.first) * kLanes;
    for (int column = x.first; column < x.last; ++column, cell += kLanes) {
      sum.add(Pack<T>::load(cell));
    }
  }
  return sum;
}

// Plane pointers of part `part` for the classes of a task: outside in lanes 0..7, inside in 8..15.
template <class T, class Data>
D2EXT_INLINE void part_planes(const HeadTask<T>& task, Data* data, int part, Data** planes) {
  const int64_t parts = int64_t(task.group) * task.group;
  for (int side = 0; side < 2; ++side) {
    for (int lane = 0; lane < kClasses; ++lane) {
      const int64_t cls = std::min(task.first_class + lane, task.classes - 1);
      planes[side * kClasses + lane] = data + ((2 * cls + side) * parts + part) * task.cells;
    }
  }
}

template <class T>
D2EXT_INLINE void forward_task(const HeadTask<T>& task) {
  const PsPlan& plan = *task.plan;
  const auto& numbers = plan.by_image[task.image];
  constexpr int kHalf = Pack<T>::kParts / 2;
  const int row_first = plan.part_first[task.part_row];
  const int row_last = plan.part_first[task.part_row + 1];
  for (int column_part = 0; column_part < task.group; ++column_part) {
    const T* planes[kLanes];
    part_planes<T, const T>(task, task.score, task.part_row * task.group + column_part, planes);
    planes_to_tile(planes, kLanes, static_cast<int>(task.cells), task.tile);
    const int column_first = plan.part_first[column_part];
    const int column_last = plan.part_first[column_part + 1];
    for (const int64_t n : numbers) {
      const CellRange* rows = plan.rows.data() + n * task.size;
      const CellRange* columns = plan.columns.data() + n * task.size;
      const double* row_share = plan.row_share.data() + n * task.size;
      const double* column_share = plan.column_share.data() + n * task.size;
      T* sums = task.sums + n * kClasses;
      typename Pack<T>::Vector total[kHalf];
      for (int part = 0; part < kHalf; ++part) {
        std::memcpy(&total[part], sums + part * kWidth<T>, sizeof(total[part]));
      }
      for (int i = row_first; i < row_last; ++i) {
        for (int j = column_first; j < column_last; ++j) {
          const Pack<T> sum = bin_sum(task.tile, task.width, rows[i], columns[j]);
          const T reciprocal =
              static_cast<T>(row_share[i]) * static_cast<T>(column_share[j]);
          for (int part = 0; part < kHalf; ++part) {
            const auto outside = sum.v[part], inside = sum.v[part + kHalf];
            total[part] += (inside > outside ? inside : outside) * reciprocal;
          }
        }
      }
      for (int part = 0; part < kHalf; ++part) {
        std::memcpy(sums + part * kWidth<T>, &total[part], sizeof(total[part]));
      }
    }
  }
}

template <class T>
D2EXT_INLINE void backward_task(const HeadTask<T>& task) {
  const PsPlan& plan = *task.plan;
  const auto& numbers = plan.by_image[task.image];
  constexpr int kHalf = Pack<T>::kParts / 2;
  using Vector = typename Pack<T>::Vector;
  const int lanes = static_cast<int>(std::min<int64_t>(kClasses, task.classes - task.first_class));
  const int row_first = plan.part_first[task.part_row];
  const int row_last = plan.part_first[task.part_row + 1];
  const int64_t bins = int64_t(task.size) * task.size;
  const T share = T(1) / static_cast<T>(bins);
  for (int column_part = 0; column_part < task.group; ++column_part) {
    const int part_number = task.part_row * task.group + column_part;
    const int column_first = plan.part_first[column_part];
    const int column_last = plan.part_first[column_part + 1];
    if (task.grad_cls) {
      const T* planes[kLanes];
      part_planes<T, const T>(task, task.score, part_number, planes);
      planes_to_tile(planes, kLanes, static_cast<int>(task.cells), task.tile);
    }
    std::memset(task.tile_grad, 0, sizeof(T) * kLanes * task.cells);
    for (const int64_t n : numbers) {
      const CellRange* rows = plan.rows.data() + n * task.size;
      const CellRange* columns = plan.columns.data() + n * task.size;
      const double* row_share = plan.row_share.data() + n * task.size;
      const double* column_share = plan.column_share.data() + n * task.size;
      T upstream[kClasses] = {};
      if (task.grad_cls) {
        const T* from = task.grad_cls + n * task.classes + task.first_class;
        for (int lane = 0; lane < lanes; ++lane) upstream[lane] = from[lane] * share;
      }
      const int64_t lane_picked = task.grad_seg ? task.picked[n] - task.first_class : -1;
      const bool has_pick = lane_picked >= 0 && lane_picked < lanes;
      if (!task.grad_cls && !has_pick) continue;
      for (int i = row_first; i < row_last; ++i) {
        for (int j = column_first; j < column_last; ++j) {
          const T reciprocal =
              static_cast<T>(row_share[i]) * static_cast<T>(column_share[j]);
          if (reciprocal == T(0)) continue;
          Pack<T> grad = Pack<T>::fill(T(0));
          if (task.grad_cls) {
            const Pack<T> sum = bin_sum(task.tile, task.width, rows[i], columns[j]);
            for (int part = 0; part < kHalf; ++part) {
              Vector value;
              std::memcpy(&value, upstream + part * kWidth<T>, sizeof(value));
              value *= reciprocal;
              const auto won = sum.v[part + kHalf] > sum.v[part];
              grad.v[part] = won ? Vector{} : value;
              grad.v[part + kHalf] = won ? value : Vector{};
            }
          }
          if (has_pick) {
            T lane_grad[kLanes];
            grad.store(lane_grad);
            const T* seg = task.grad_seg + n * 2 * bins + i * task.size + j;
            lane_grad[lane_picked] += seg[0] * reciprocal;
            lane_grad[lane_picked + kClasses] += seg[bins] * reciprocal;
            grad = Pack<T>::load(lane_grad);
          }
          for (int row = rows[i].first; row < rows[i].last; ++row) {
            T* cell = task.tile_grad + (int64_t(row) * task.width + columns[j].first) * kLanes;
            for (int column = columns[j].first; column < columns[j].last; ++column, cell += kLanes) {
              Pack<T> sum = Pack<T>::load(cell);
              sum.add(grad);
              sum.store(cell);
            }
          }
        }
      }
    }
    T* planes[kLanes];
    part_planes<T, T>(task, task.score_grad, part_number, planes);
    if (lanes == kClasses) {
      tile_to_planes(task.tile_grad, kLanes, static_cast<int>(task.cells), planes);
    } else {
      for (int64_t cell = 0; cell < task.cells; ++cell) {
        const T* from = task.tile_grad + cell * kLanes;
        for (int lane = 0; lane < lanes; ++lane) {
          planes[lane][cell] = from[lane];
          planes[kClasses + lane][cell] = from[kClasses + lane];
        }
      }
    }
  }
}

D2EXT_CLONES void run_forward(const HeadTask<float>& task) {
  forward_task(task);
}
D2EXT_CLONES void run_backward(const HeadTask<float>& task) {
  backward_task(task);
}
void run_forward(const HeadTask<double>& task) {
  forward_task(task);
}
void run_backward(const HeadTask<double>& task) {
  backward_task(task);
}

template <class T>
HeadTask<T> base_task(const PsPlan& plan, at::IntArrayRef shape, const PsGeometry& geometry) {
  HeadTask<T> task{};
  task.plan = &plan;
  task.group = geometry.group_size;
  task.size = geometry.out_size;
  task.width = static_cast<int>(shape[3]);
  task.cells = shape[2] * shape[3];
  task.classes = shape[1] / (2 * geometry.group_size * geometry.group_size);
  return task;
}

// Task `index` of (image, part row, class block).
template <class T>
HeadTask<T> task_at(const HeadTask<T>& base, int64_t index, int64_t blocks) {
  HeadTask<T> task = base;
  task.image = index / (base.group * blocks);
  task.part_row = static_cast<int>(index / blocks % base.group);
  task.first_class = index % blocks * kClasses;
  return task;
}

template <class T>
void forward(
    const at::Tensor& score, const PsPlan& plan, const PsGeometry& geometry,
    const at::Tensor& cls_score) {
  const HeadTask<T> base = base_task<T>(plan, score.sizes(), geometry);
  const int64_t blocks = (base.classes + kClasses - 1) / kClasses, count = cls_score.size(0);
  const T* from = score.const_data_ptr<T>();
  const int64_t image_size = score.size(1) * base.cells;
  // one partial (N, 8) per part row and class block; a RoI is written by the tasks of its image only
  const Scratch<T> partial(size_t(base.group) * blocks * count * kClasses);
  T* const sums = partial.get();
  std::fill(sums, sums + base.group * blocks * count * kClasses, T(0));
  at::parallel_for(
      0, score.size(0) * base.group * blocks, 1, [&](int64_t begin, int64_t end) {
        const Scratch<T> tile(kLanes * base.cells);
        for (int64_t index = begin; index < end; ++index) {
          HeadTask<T> task = task_at(base, index, blocks);
          if (plan.by_image[task.image].empty()) continue;
          task.score = from + task.image * image_size;
          task.sums = sums + (index % (base.group * blocks)) * count * kClasses;
          task.tile = tile.get();
          run_forward(task);
        }
      });
  T* to = cls_score.mutable_data_ptr<T>();
  const T bins = static_cast<T>(geometry.out_size) * static_cast<T>(geometry.out_size);
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t cls = 0; cls < base.classes; ++cls) {
      T sum = T(0);
      for (int row = 0; row < base.group; ++row) {
        sum += sums[((row * blocks + cls / kClasses) * count + n) * kClasses + cls % kClasses];
      }
      to[n * base.classes + cls] = sum / bins;
    }
  }
}

template <class T>
void pick_best(const at::Tensor& cls_score, int64_t* picked) {
  const T* scores = cls_score.const_data_ptr<T>();
  const int64_t classes = cls_score.size(1);
  for (int64_t n = 0; n < cls_score.size(0); ++n) {
    const T* row = scores + n * classes;
    picked[n] = classes < 2 ? -1 : 1;
    for (int64_t cls = 2; cls < classes; ++cls) {
      if (row[cls] > row[picked[n]]) picked[n] = cls;
    }
  }
}

// Both sides of the picked class at once: they share every bin.
template <class T>
void read_masks(
    const at::Tensor& score, const PsPlan& plan, const PsGeometry& geometry,
    const int64_t* picked, const at::Tensor& seg_logit) {
  const T* from = score.const_data_ptr<T>();
  T* to = seg_logit.mutable_data_ptr<T>();
  const int group = geometry.group_size, size = geometry.out_size;
  const int64_t parts = int64_t(group) * group, bins = int64_t(size) * size;
  const int64_t width = score.size(3), cells = score.size(2) * width;
  const int64_t classes = score.size(1) / (2 * parts);
  at::parallel_for(0, seg_logit.size(0), 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* outside = to + n * 2 * bins;
      T* inside = outside + bins;
      if (plan.image[n] < 0 || picked[n] < 0 || picked[n] >= classes) {
        std::fill(outside, outside + 2 * bins, T(0));
        continue;
      }
      const T* planes = from + (plan.image[n] * score.size(1) + 2 * picked[n] * parts) * cells;
      const CellRange* rows = plan.rows.data() + n * size;
      const CellRange* columns = plan.columns.data() + n * size;
      const double* row_share = plan.row_share.data() + n * size;
      const double* column_share = plan.column_share.data() + n * size;
      for (int i = 0; i < size; ++i) {
        const T* row_planes = planes + int64_t(plan.part[i]) * group * cells;
        for (int j = 0; j < size; ++j) {
          const T* plane = row_planes + plan.part[j] * cells;
          const T share = static_cast<T>(row_share[i]) * static_cast<T>(column_share[j]);
          T out = T(0), in = T(0);
          for (int row = rows[i].first; row < rows[i].last; ++row) {
            const T* cell = plane + row * width;
            for (int x = columns[j].first; x < columns[j].last; ++x) {
              out += cell[x];
              in += cell[x + parts * cells];
            }
          }
          *outside++ = out * share;
          *inside++ = in * share;
        }
      }
    }
  });
}

template <class T>
void backward(
    const at::Tensor& grad_cls, const at::Tensor& grad_seg, const at::Tensor& score,
    const at::Tensor& picked, const PsPlan& plan, const PsGeometry& geometry,
    const at::Tensor& score_grad) {
  HeadTask<T> base = base_task<T>(plan, score.sizes(), geometry);
  const int64_t blocks = (base.classes + kClasses - 1) / kClasses;
  const int64_t image_size = score.size(1) * base.cells;
  const T* from = score.const_data_ptr<T>();
  T* to = score_grad.mutable_data_ptr<T>();
  if (grad_cls.defined()) base.grad_cls = grad_cls.const_data_ptr<T>();
  if (grad_seg.defined()) base.grad_seg = grad_seg.const_data_ptr<T>();
  base.picked = picked.const_data_ptr<int64_t>();
  at::parallel_for(
      0, score.size(0) * base.group * blocks, 1, [&](int64_t begin, int64_t end) {
        const Scratch<T> tile(kLanes * base.cells), tile_grad(kLanes * base.cells);
        for (int64_t index = begin; index < end; ++index) {
          HeadTask<T> task = task_at(base, index, blocks);
          task.score = from + task.image * image_size;
          task.score_grad = to + task.image * image_size;
          task.tile = tile.get();
          task.tile_grad = tile_grad.get();
          run_backward(task);
        }
      });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> fcis_joint_head_cpu(
    const at::Tensor& score, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, const std::optional<at::Tensor>& pick, bool copy, bool legacy) {
  const char* op = "fcis_joint_head";
  check_ps(op, "score", score, rois, spatial_scale, group_size, out_size, 2);
  const int64_t count = rois.size(0), classes = score.size(1) / (2 * group_size * group_size);
  if (pick) check_pick(op, *pick, score, count);
  const PsGeometry geometry{
      spatial_scale, static_cast<int>(group_size), static_cast<int>(out_size), {copy, legacy}};
  const at::Tensor data = score.to(accumulate_type(score)).contiguous();
  const auto options = data.options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor cls_score = at::zeros({count, classes}, data.options());
  at::Tensor seg_logit = at::empty({count, 2, out_size, out_size}, options);
  at::Tensor picked = pick ? pick->clone().contiguous() : at::empty({count}, rois.options().dtype(at::kLong));
  const PsPlan plan(rois, score.sizes(), geometry);
  const bool wide = data.scalar_type() == at::kDouble;
  if (data.numel() > 0 && count > 0) {
    wide ? forward<double>(data, plan, geometry, cls_score)
         : forward<float>(data, plan, geometry, cls_score);
  }
  int64_t* numbers = picked.mutable_data_ptr<int64_t>();
  if (!pick) wide ? pick_best<double>(cls_score, numbers) : pick_best<float>(cls_score, numbers);
  if (data.numel() == 0) {
    seg_logit.zero_();
  } else if (wide) {
    read_masks<double>(data, plan, geometry, numbers, seg_logit);
  } else {
    read_masks<float>(data, plan, geometry, numbers, seg_logit);
  }
  return {
      cls_score.to(score.scalar_type()),
      seg_logit.to(score.scalar_type()).contiguous(layout_of(score)), picked};
}

at::Tensor fcis_joint_head_backward_cpu(
    const std::optional<at::Tensor>& grad_cls, const std::optional<at::Tensor>& grad_seg,
    const at::Tensor& score, const at::Tensor& rois, const at::Tensor& picked,
    double spatial_scale, int64_t group_size, int64_t out_size, bool copy, bool legacy) {
  const char* op = "fcis_joint_head";
  check_ps(op, "score", score, rois, spatial_scale, group_size, out_size, 2);
  const int64_t count = rois.size(0), classes = score.size(1) / (2 * group_size * group_size);
  check_pick(op, picked, score, count);
  check_head_gradient(op, grad_cls, grad_seg, score, count, classes, out_size);
  const PsGeometry geometry{
      spatial_scale, static_cast<int>(group_size), static_cast<int>(out_size), {copy, legacy}};
  const auto type = accumulate_type(score);
  const at::Tensor data = score.to(type).contiguous();
  at::Tensor score_grad =
      at::empty(score.sizes(), data.options().memory_format(at::MemoryFormat::Contiguous));
  if (score_grad.numel() > 0) {
    const PsPlan plan(rois, score.sizes(), geometry);
    const at::Tensor cls = grad_cls ? grad_cls->to(type).contiguous() : at::Tensor();
    const at::Tensor seg = grad_seg ? grad_seg->to(type).contiguous() : at::Tensor();
    const at::Tensor numbers = picked.contiguous();
    if (type == at::kDouble) {
      backward<double>(cls, seg, data, numbers, plan, geometry, score_grad);
    } else {
      backward<float>(cls, seg, data, numbers, plan, geometry, score_grad);
    }
  }
  return score_grad.to(score.scalar_type()).contiguous(layout_of(score));
}

}  // namespace d2ext
