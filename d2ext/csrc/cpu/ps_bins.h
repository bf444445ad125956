// Bins of all RoIs of a position-sensitive operator, computed once and shared by its tasks.
#pragma once

#include <vector>

#include "../common.h"

namespace d2ext {

struct PsGeometry {
  double scale;
  int group_size, out_size;
  PsRule rule;
};

struct PsPlan {
  std::vector<CellRange> rows, columns;  // (N, P)
  std::vector<int64_t> image;            // (N), -1 for a row that takes no part
  std::vector<std::vector<int64_t>> by_image;
  std::vector<int> part;        // (P) part of an output position
  std::vector<int> part_first;  // (k + 1) first output position of a part

  PsPlan(const at::Tensor& rois, at::IntArrayRef shape, const PsGeometry& geometry) {
    const int size = geometry.out_size, group = geometry.group_size;
    const int height = static_cast<int>(shape[2]), width = static_cast<int>(shape[3]);
    const int64_t count = rois.size(0), batch = shape[0];
    rows.resize(count * size);
    columns.resize(count * size);
    image.resize(count);
    by_image.resize(batch);
    const bool wide = rois.scalar_type() == at::kDouble;
    const at::Tensor boxes = rois.contiguous();
    const float scale = static_cast<float>(geometry.scale);
    for (int64_t n = 0; n < count; ++n) {
      float roi[5];
      if (wide) {
        const double* row = boxes.const_data_ptr<double>() + n * 5;
        image[n] = roi_image(row, batch);
        for (int i = 0; i < 5; ++i) roi[i] = static_cast<float>(row[i]);
      } else {
        const float* row = boxes.const_data_ptr<float>() + n * 5;
        image[n] = roi_image(row, batch);
        for (int i = 0; i < 5; ++i) roi[i] = row[i];
      }
      if (image[n] < 0) continue;
      by_image[image[n]].push_back(n);
      const PsSpan x = ps_span(roi[1], roi[3], scale, size, geometry.rule);
      const PsSpan y = ps_span(roi[2], roi[4], scale, size, geometry.rule);
      for (int p = 0; p < size; ++p) {
        rows[n * size + p] = ps_bin(y, p, height, geometry.rule);
        columns[n * size + p] = ps_bin(x, p, width, geometry.rule);
      }
    }
    for (int p = 0; p < size; ++p) {
      part.push_back(p * group / size);
      while (static_cast<int>(part_first.size()) <= part.back()) part_first.push_back(p);
    }
    part_first.push_back(size);
  }
};

// Mean of a plane over one bin.
template <class T>
inline T bin_mean(const T* plane, int64_t width, CellRange y, CellRange x) {
  if (y.first >= y.last || x.first >= x.last) return T(0);
  T sum = T(0);
  for (int row = y.first; row < y.last; ++row) {
    for (int column = x.first; column < x.last; ++column) sum += plane[row * width + column];
  }
  const T area = static_cast<T>(y.last - y.first) * static_cast<T>(x.last - x.first);
  return sum / area;
}

// Its transpose.
template <class T>
inline void spread_bin(T* plane, int64_t width, CellRange y, CellRange x, T grad) {
  if (y.first >= y.last || x.first >= x.last) return;
  const T share = grad / (static_cast<T>(y.last - y.first) * static_cast<T>(x.last - x.first));
  for (int row = y.first; row < y.last; ++row) {
    for (int column = x.first; column < x.last; ++column) plane[row * width + column] += share;
  }
}

}  // namespace d2ext
