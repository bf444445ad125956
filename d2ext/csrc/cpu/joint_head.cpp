// FCIS' joint head on the CPU. A task takes one row of parts and eight classes: per part the sixteen
// planes (eight outside, eight inside) become a [cell][16] tile, over which all RoIs of the image pass.
// The assembled tensor never exists, and each plane is read and its gradient written once.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "head_masks.h"
#include "pack.h"

namespace d2ext {
namespace {

constexpr int kClasses = kLanes / 2;

template <class T>
struct HeadTask {
  const PsPlan* plan;
  int64_t image;
  int part_row, group, size, width;
  int64_t cells, classes, first_class;
  int first_lane;
  const T* score;       // of the image
  T* score_grad;        // backward: of the image
  T* sums;              // forward: (N, 8) of this task
  const T* grad_cls;    // backward, may be null: (N, K)
  const T* grad_seg;    // backward, may be null: (N, 2, P, P)
  const int64_t* picked;
  T* tile;
  T* tile_grad;
  T* unused;            // (cells)
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

// The mean over one or two rows and columns is a quarter of the sum over the first and last of each:
// four loads and no loop, whose end the processor could not foresee.
template <class T>
D2EXT_INLINE Pack<T> corner_sum(const T* first_row, const T* last_row, CellRange x) {
  const int64_t first = int64_t(x.first) * kLanes, last = int64_t(x.last - 1) * kLanes;
  Pack<T> sum = Pack<T>::load(first_row + first);
  sum.add(Pack<T>::load(first_row + last));
  Pack<T> other = Pack<T>::load(last_row + first);
  other.add(Pack<T>::load(last_row + last));
  sum.add(other);
  return sum;
}

template <class T>
D2EXT_INLINE void add_to_cell(const Pack<T>& value, T* cell) {
  Pack<T> sum = Pack<T>::load(cell);
  sum.add(value);
  sum.store(cell);
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

// Calls step(sum, row run, column run, weight that makes the sum a mean) for the bins of one RoI in
// one part; bins of equal cells come once, with the weight of all of them.
template <class T, class F>
D2EXT_INLINE void over_bins(const HeadTask<T>& task, int64_t n, int column_part, const F& step) {
  const PsPlan& plan = *task.plan;
  const int* row_first = plan.row_run_first.data() + n * (task.group + 1) + task.part_row;
  const int* column_first = plan.column_run_first.data() + n * (task.group + 1) + column_part;
  const PsRun* rows = plan.row_runs.data() + n * task.size;
  const PsRun* columns = plan.column_runs.data() + n * task.size;
  const bool narrow = plan.narrow[n];
  for (int i = row_first[0]; i < row_first[1]; ++i) {
    const CellRange y = rows[i].cells;
    const T weight = static_cast<T>(narrow ? rows[i].corner : rows[i].share);
    const T* top = task.tile + int64_t(y.first) * task.width * kLanes;
    const T* bottom = task.tile + int64_t(y.last - 1) * task.width * kLanes;
    for (int j = column_first[0]; j < column_first[1]; ++j) {
      const CellRange x = columns[j].cells;
      const Pack<T> sum =
          narrow ? corner_sum(top, bottom, x) : bin_sum(task.tile, task.width, y, x);
      step(
          sum, rows[i], columns[j],
          weight * static_cast<T>(narrow ? columns[j].corner : columns[j].share));
    }
  }
}

template <class T>
D2EXT_INLINE void forward_task(const HeadTask<T>& task) {
  constexpr int kHalf = Pack<T>::kParts / 2;
  for (int column_part = 0; column_part < task.group; ++column_part) {
    const T* planes[kLanes];
    part_planes<T, const T>(task, task.score, task.part_row * task.group + column_part, planes);
    planes_to_tile(planes, kLanes, static_cast<int>(task.cells), task.tile);
    for (const int64_t n : task.plan->by_image[task.image]) {
      T* sums = task.sums + n * kClasses;
      typename Pack<T>::Vector total[kHalf];
      for (int part = 0; part < kHalf; ++part) {
        std::memcpy(&total[part], sums + part * kWidth<T>, sizeof(total[part]));
      }
      over_bins(
          task, n, column_part,
          [&](const Pack<T>& sum, const PsRun&, const PsRun&, T weight) D2EXT_LAMBDA {
            for (int part = 0; part < kHalf; ++part) {
              const auto outside = sum.v[part], inside = sum.v[part + kHalf];
              total[part] += (inside > outside ? inside : outside) * weight;
            }
          });
      for (int part = 0; part < kHalf; ++part) {
        std::memcpy(sums + part * kWidth<T>, &total[part], sizeof(total[part]));
      }
    }
  }
}

// Gradient of the class scores of one RoI in one part, to the winning side of each bin.
template <class T>
D2EXT_INLINE void add_score_gradient(const HeadTask<T>& task, int64_t n, int column_part) {
  constexpr int kHalf = Pack<T>::kParts / 2;
  using Vector = typename Pack<T>::Vector;
  const int64_t lanes = std::min<int64_t>(kClasses, task.classes - task.first_class);
  const T bins = static_cast<T>(task.size) * static_cast<T>(task.size);
  const T* from = task.grad_cls + n * task.classes + task.first_class;
  T upstream[kClasses] = {};
  for (int64_t lane = 0; lane < lanes; ++lane) upstream[lane] = from[lane] / bins;
  Vector value[kHalf];
  std::memcpy(&value, upstream, sizeof(value));
  over_bins(
      task, n, column_part,
      [&](const Pack<T>& sum, const PsRun& rows, const PsRun& columns, T) D2EXT_LAMBDA {
        const CellRange y = rows.cells, x = columns.cells;
        const T factor = static_cast<T>(rows.share) * static_cast<T>(columns.share);
        Pack<T> grad;
        for (int part = 0; part < kHalf; ++part) {
          const auto won = sum.v[part + kHalf] > sum.v[part];
          grad.v[part] = won ? Vector{} : value[part] * factor;
          grad.v[part + kHalf] = won ? value[part] * factor : Vector{};
        }
        for (int row = y.first; row < y.last; ++row) {
          T* cell = task.tile_grad + (int64_t(row) * task.width + x.first) * kLanes;
          for (int column = x.first; column < x.last; ++column, cell += kLanes) {
            add_to_cell(grad, cell);
          }
        }
      });
}

// Gradient of the mask of one RoI, whose class is in `lane`, in one part.
template <class T>
D2EXT_INLINE void add_mask_gradient(
    const HeadTask<T>& task, int64_t n, int column_part, int64_t lane) {
  const PsPlan& plan = *task.plan;
  const PsRun* rows = plan.row_runs.data() + n * task.size;
  const PsRun* columns = plan.column_runs.data() + n * task.size;
  const int* row_first = plan.row_run_first.data() + n * (task.group + 1) + task.part_row;
  const int* column_first = plan.column_run_first.data() + n * (task.group + 1) + column_part;
  const T* upstream = task.grad_seg + n * 2 * task.size * task.size;
  const T* upstream_inside = upstream + task.size * task.size;
  for (const PsRun* y = rows + row_first[0]; y < rows + row_first[1]; ++y) {
    for (const PsRun* x = columns + column_first[0]; x < columns + column_first[1]; ++x) {
      const double share = y->each * x->each;
      const T outside = static_cast<T>(run_sum(upstream, task.size, *y, *x) * share);
      const T inside = static_cast<T>(run_sum(upstream_inside, task.size, *y, *x) * share);
      for (int row = y->cells.first; row < y->cells.last; ++row) {
        T* cell = task.tile_grad + (int64_t(row) * task.width + x->cells.first) * kLanes + lane;
        for (int column = x->cells.first; column < x->cells.last; ++column, cell += kLanes) {
          cell[0] += outside;
          cell[kClasses] += inside;
        }
      }
    }
  }
}

template <class T>
D2EXT_INLINE void backward_task(const HeadTask<T>& task) {
  const int64_t lanes = std::min<int64_t>(kClasses, task.classes - task.first_class);
  for (int column_part = 0; column_part < task.group; ++column_part) {
    const int part_number = task.part_row * task.group + column_part;
    if (task.grad_cls) {
      const T* planes[kLanes];
      part_planes<T, const T>(task, task.score, part_number, planes);
      planes_to_tile(planes, kLanes, static_cast<int>(task.cells), task.tile);
    }
    std::memset(task.tile_grad, 0, sizeof(T) * kLanes * task.cells);
    for (const int64_t n : task.plan->by_image[task.image]) {
      if (task.grad_cls) add_score_gradient(task, n, column_part);
      const int64_t picked = task.grad_seg ? task.picked[n] - task.first_class : -1;
      if (picked >= task.first_lane && picked < lanes) {
        add_mask_gradient(task, n, column_part, picked);
      }
    }
    T* planes[kLanes];
    part_planes<T, T>(task, task.score_grad, part_number, planes);
    // lanes of classes that another block or nobody owns go nowhere
    for (int lane = 0; lane < kClasses; ++lane) {
      if (lane < task.first_lane || lane >= lanes) {
        planes[lane] = planes[kClasses + lane] = task.unused;
      }
    }
    tile_to_planes(task.tile_grad, kLanes, static_cast<int>(task.cells), planes);
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
  // the last block reaches back into its neighbour rather than over the end, so that the planes of
  // every block lie evenly; `first_lane` is where its own classes begin
  const int64_t wanted = index % blocks * kClasses;
  task.first_class = std::max<int64_t>(0, std::min(wanted, base.classes - kClasses));
  task.first_lane = static_cast<int>(wanted - task.first_class);
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
        const int64_t block = cls / kClasses;
        const int64_t first = std::max<int64_t>(0, std::min(block * kClasses, base.classes - kClasses));
        sum += sums[((row * blocks + block) * count + n) * kClasses + cls - first];
      }
      to[n * base.classes + cls] = sum / bins;
    }
  }
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
        const Scratch<T> unused(base.cells);
        for (int64_t index = begin; index < end; ++index) {
          HeadTask<T> task = task_at(base, index, blocks);
          task.score = from + task.image * image_size;
          task.score_grad = to + task.image * image_size;
          task.tile = tile.get();
          task.tile_grad = tile_grad.get();
          task.unused = unused.get();
          run_backward(task);
        }
      });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> fcis_joint_head_cpu(
    const at::Tensor& score, const at::Tensor& rois, double spatial_scale, int64_t group_size,
    int64_t out_size, const std::optional<at::Tensor>& pick, bool inclusive) {
  const char* op = "fcis_joint_head";
  check_ps(op, "score", score, rois, spatial_scale, group_size, out_size, 2);
  const int64_t count = rois.size(0), classes = score.size(1) / (2 * group_size * group_size);
  if (pick) check_pick(op, *pick, score, count);
  const PsGeometry geometry{
      spatial_scale, static_cast<int>(group_size), static_cast<int>(out_size), {inclusive}};
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
    double spatial_scale, int64_t group_size, int64_t out_size, bool inclusive) {
  const char* op = "fcis_joint_head";
  check_ps(op, "score", score, rois, spatial_scale, group_size, out_size, 2);
  const int64_t count = rois.size(0), classes = score.size(1) / (2 * group_size * group_size);
  check_pick(op, picked, score, count);
  check_head_gradient(op, grad_cls, grad_seg, score, count, classes, out_size);
  const PsGeometry geometry{
      spatial_scale, static_cast<int>(group_size), static_cast<int>(out_size), {inclusive}};
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

TORCH_LIBRARY_IMPL(d2ext, CPU, library) {
  library.impl("fcis_joint_head", &fcis_joint_head_cpu);
  library.impl("fcis_joint_head_backward", &fcis_joint_head_backward_cpu);
}

}  // namespace d2ext
