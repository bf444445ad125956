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

inline double share_of(CellRange range) {
  return range.last > range.first ? 1.0 / (range.last - range.first) : 0.0;
}

inline bool one_or_two(CellRange range) {
  return range.last - range.first == 1 || range.last - range.first == 2;
}

// Neighbouring output positions of one part that read the same cells; of small RoIs that is most.
struct PsRun {
  CellRange cells;
  double each;    // 1 / number of cells
  double share;   // how many they are / number of cells
  double corner;  // how many they are / 2, for sums over the first and last cell
  int first, last;  // the positions, half-open
};

struct PsPlan {
  std::vector<CellRange> rows, columns;  // (N, P)
  std::vector<double> row_share, column_share;  // (N, P) 1 / length, 0 when empty
  std::vector<int64_t> image;            // (N), -1 for a row that takes no part
  std::vector<uint8_t> narrow;           // (N) every bin has one or two rows and columns
  std::vector<std::vector<int64_t>> by_image;
  std::vector<PsRun> row_runs, column_runs;          // (N, P), runs without cells left out
  std::vector<int> row_run_first, column_run_first;  // (N, k + 1) first run of a part
  std::vector<int> part;        // (P) part of an output position
  std::vector<int> part_first;  // (k + 1) first output position of a part

  PsPlan(const at::Tensor& rois, at::IntArrayRef shape, const PsGeometry& geometry) {
    const int size = geometry.out_size, group = geometry.group_size;
    const int height = static_cast<int>(shape[2]), width = static_cast<int>(shape[3]);
    const int64_t count = rois.size(0), batch = shape[0];
    rows.resize(count * size);
    columns.resize(count * size);
    row_share.resize(count * size);
    column_share.resize(count * size);
    image.resize(count);
    narrow.assign(count, 0);
    by_image.resize(batch);
    row_runs.resize(count * size);
    column_runs.resize(count * size);
    row_run_first.resize(count * (group + 1));
    column_run_first.resize(count * (group + 1));
    for (int p = 0; p < size; ++p) {
      part.push_back(p * group / size);
      while (static_cast<int>(part_first.size()) <= part.back()) part_first.push_back(p);
    }
    part_first.push_back(size);
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
      bool few = true;
      for (int p = 0; p < size; ++p) {
        rows[n * size + p] = ps_bin(y, p, height);
        columns[n * size + p] = ps_bin(x, p, width);
        row_share[n * size + p] = share_of(rows[n * size + p]);
        column_share[n * size + p] = share_of(columns[n * size + p]);
        few = few && one_or_two(rows[n * size + p]) && one_or_two(columns[n * size + p]);
      }
      narrow[n] = few;
      find_runs(&rows[n * size], &row_runs[n * size], &row_run_first[n * (group + 1)]);
      find_runs(&columns[n * size], &column_runs[n * size], &column_run_first[n * (group + 1)]);
    }
  }

  // The runs of one axis of one RoI, and where those of each part begin.
  void find_runs(const CellRange* bins, PsRun* runs, int* first) const {
    int made = 0;
    for (size_t g = 0; g + 1 < part_first.size(); ++g) {
      first[g] = made;
      for (int p = part_first[g]; p < part_first[g + 1]; ++p) {
        if (bins[p].last <= bins[p].first) continue;
        const double share = share_of(bins[p]);
        PsRun* previous = made > first[g] ? runs + made - 1 : nullptr;
        if (previous && previous->cells.first == bins[p].first &&
            previous->cells.last == bins[p].last) {
          previous->share += share;
          previous->corner += 0.5;
          previous->last = p + 1;
        } else {
          runs[made++] = {bins[p], share, share, 0.5, p, p + 1};
        }
      }
    }
    first[part_first.size() - 1] = made;
  }
};

// The assembly of one map of one RoI, row by row: `to` takes the mean of each bin.
template <class T, class F>
inline void assemble_map(
    const PsPlan& plan, int64_t roi, int group, int size, int64_t width, int64_t cells,
    const T* planes, const F& to) {
  const CellRange* rows = plan.rows.data() + roi * size;
  const CellRange* columns = plan.columns.data() + roi * size;
  const double* row_share = plan.row_share.data() + roi * size;
  const double* column_share = plan.column_share.data() + roi * size;
  for (int i = 0; i < size; ++i) {
    const T* row_planes = planes + int64_t(plan.part[i]) * group * cells;
    const T share = static_cast<T>(row_share[i]);
    for (int j = 0; j < size; ++j) {
      const T* plane = row_planes + plan.part[j] * cells;
      T sum = T(0);
      for (int row = rows[i].first; row < rows[i].last; ++row) {
        const T* cell = plane + row * width;
        for (int x = columns[j].first; x < columns[j].last; ++x) sum += cell[x];
      }
      to(sum * (share * static_cast<T>(column_share[j])));
    }
  }
}

// Call `use` with the rows, the columns and the plane of all bins of one map of one RoI that have cells,
// those of equal cells together: a cell takes part in few sums, however many bins there are.
template <class T, class F>
inline void over_runs(
    const PsPlan& plan, int64_t roi, int group, int size, int64_t cells, T* planes, const F& use) {
  const PsRun* rows = plan.row_runs.data() + roi * size;
  const PsRun* columns = plan.column_runs.data() + roi * size;
  const int* row_first = plan.row_run_first.data() + roi * (group + 1);
  const int* column_first = plan.column_run_first.data() + roi * (group + 1);
  for (int a = 0; a < group; ++a) {
    for (const PsRun* y = rows + row_first[a]; y < rows + row_first[a + 1]; ++y) {
      for (int b = 0; b < group; ++b) {
        T* plane = planes + (int64_t(a) * group + b) * cells;
        for (const PsRun* x = columns + column_first[b]; x < columns + column_first[b + 1]; ++x) {
          use(*y, *x, plane);
        }
      }
    }
  }
}

// Sum of the gradients of the bins of a run.
template <class T>
inline double run_sum(const T* grad, int size, const PsRun& rows, const PsRun& columns) {
  double sum = 0.0;
  for (int i = rows.first; i < rows.last; ++i) {
    for (int j = columns.first; j < columns.last; ++j) sum += grad[i * size + j];
  }
  return sum;
}

}  // namespace d2ext
