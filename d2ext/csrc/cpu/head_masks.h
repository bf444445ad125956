// The second half of FCIS' joint head on the CPU: the class of each RoI and its two mask maps.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "pack.h"
#include "ps_bins.h"

namespace d2ext {

template <class T>
void pick_best(const at::Tensor& cls_score, int64_t* picked) {
  const T* scores = cls_score.const_data_ptr<T>();
  const int64_t classes = cls_score.size(1);
  for (int64_t n = 0; n < cls_score.size(0); ++n) {
    const T* row = scores + n * classes;
    picked[n] = classes < 2 ? -1 : 0;
    for (int64_t cls = 1; cls + 1 < classes; ++cls) {  // the last is the background
      if (row[cls] > row[picked[n]]) picked[n] = cls;
    }
  }
}

// The masks of one RoI whose bins have one or two rows and columns: no inner loops, as above.
template <class T>
D2EXT_INLINE void corner_masks(
    const T* planes, int64_t side, int64_t row_part, int width, const int* part, int size,
    const CellRange* rows, const int64_t* first, const int64_t* last, T* outside, T* inside) {
  for (int i = 0; i < size; ++i) {
    const T* a = planes + part[i] * row_part + int64_t(rows[i].first) * width;
    const T* b = planes + part[i] * row_part + int64_t(rows[i].last - 1) * width;
    for (int j = 0; j < size; ++j) {
      outside[j] = ((a[first[j]] + a[last[j]]) + (b[first[j]] + b[last[j]])) * T(0.25);
    }
    a += side;
    b += side;
    for (int j = 0; j < size; ++j) {
      inside[j] = ((a[first[j]] + a[last[j]]) + (b[first[j]] + b[last[j]])) * T(0.25);
    }
    outside += size;
    inside += size;
  }
}

// Both sides of the picked class, RoIs of one class one after the other: they read the same planes.
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
  std::vector<int64_t> order(seg_logit.size(0));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return picked[a] < picked[b]; });
  at::parallel_for(0, seg_logit.size(0), 4, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> first(size), last(size);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = order[at];
      T* outside = to + n * 2 * bins;
      T* inside = outside + bins;
      if (plan.image[n] < 0 || picked[n] < 0 || picked[n] >= classes) {
        std::fill(outside, outside + 2 * bins, T(0));
        continue;
      }
      const T* planes = from + (plan.image[n] * score.size(1) + 2 * picked[n] * parts) * cells;
      if (!plan.narrow[n]) {
        const auto take = [](T*& side) { return [&side](T mean) { *side++ = mean; }; };
        assemble_map(plan, n, group, size, width, cells, planes, take(outside));
        assemble_map(plan, n, group, size, width, cells, planes + parts * cells, take(inside));
        continue;
      }
      const CellRange* columns = plan.columns.data() + n * size;
      for (int j = 0; j < size; ++j) {
        first[j] = plan.part[j] * cells + columns[j].first;
        last[j] = plan.part[j] * cells + columns[j].last - 1;
      }
      corner_masks(
          planes, parts * cells, group * cells, static_cast<int>(width), plan.part.data(), size,
          plan.rows.data() + n * size, first.data(), last.data(), outside, inside);
    }
  });
}

}  // namespace d2ext
