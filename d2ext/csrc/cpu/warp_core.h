// Arithmetic of RoI warping on one tile of sixteen channels. No torch here: roi_warp.cpp feeds it.
#pragma once

#include <vector>

#include "../geometry.h"
#include "pack.h"

namespace d2ext {

// One sample along one axis. Cells are offsets into a [cell][16] tile.
template <class T>
struct TileSample {
  int cell0, cell1;
  T weight0, weight1, slope0, slope1;
  T to_start, to_end;  // derivative of the position by the two box ends, in pixels
  bool valid;
};

// All samples of one RoI: rows.count per bin, bins in order; columns likewise.
template <class T>
struct RoiSamples {
  const TileSample<T>* rows;
  const TileSample<T>* columns;
  int row_count, column_count;
};

struct WarpSize {
  int out_h, out_w;
  bool edge;  // a sample outside the map is left out of the maximum, else it counts as 0
  int64_t cells;
};

template <class T>
D2EXT_INLINE Pack<T> read_sample(const T* tile, const TileSample<T>& y, const TileSample<T>& x) {
  const T* top = tile + y.cell0;
  const T* low = tile + y.cell1;
  Pack<T> value = Pack<T>::load(top + x.cell0).times(y.weight0 * x.weight0);
  value.add(Pack<T>::load(top + x.cell1), y.weight0 * x.weight1);
  value.add(Pack<T>::load(low + x.cell0), y.weight1 * x.weight0);
  value.add(Pack<T>::load(low + x.cell1), y.weight1 * x.weight1);
  return value;
}

template <class T>
D2EXT_INLINE void points_forward(
    const T* tile, const RoiSamples<T>& roi, const WarpSize& size, T* buffer) {
  for (int p = 0; p < size.out_h; ++p) {
    const TileSample<T>& y = roi.rows[p];
    for (int q = 0; q < size.out_w; ++q, buffer += kLanes) {
      const TileSample<T>& x = roi.columns[q];
      if (y.valid && x.valid) {
        read_sample(tile, y, x).store(buffer);
      } else {
        Pack<T>::fill(T(0)).store(buffer);
      }
    }
  }
}

// Maximum over the samples of one bin; `winner` gets the number of the first best one.
// kCount > 0 fixes the samples per axis.
template <class T, int kCount>
D2EXT_INLINE Pack<T> bin_maximum(
    const T* tile, const TileSample<T>* rows, const TileSample<T>* columns, int row_count,
    int column_count, bool edge, Pack<T>& winner) {
  const int ny = kCount ? kCount : row_count, nx = kCount ? kCount : column_count;
  Pack<T> best = Pack<T>::fill(T(0));
  winner = Pack<T>::fill(T(-1));
  bool first = true;
  for (int i = 0; i < ny; ++i) {
    for (int j = 0; j < nx; ++j) {
      const bool valid = rows[i].valid && columns[j].valid;
      if (!valid && edge) continue;
      const Pack<T> value =
          valid ? read_sample(tile, rows[i], columns[j]) : Pack<T>::fill(T(0));
      const T number = static_cast<T>(i * nx + j);
      if (first) {
        best = value;
        winner = Pack<T>::fill(number);
        first = false;
      } else {
        best.challenge(value, winner, number);
      }
    }
  }
  return best;
}

template <class T, int kCount>
D2EXT_INLINE void maxima_forward(
    const T* tile, const RoiSamples<T>& roi, const WarpSize& size, T* buffer) {
  Pack<T> winner;
  for (int p = 0; p < size.out_h; ++p) {
    for (int q = 0; q < size.out_w; ++q, buffer += kLanes) {
      bin_maximum<T, kCount>(
          tile, roi.rows + p * roi.row_count, roi.columns + q * roi.column_count, roi.row_count,
          roi.column_count, size.edge, winner)
          .store(buffer);
    }
  }
}

template <class T>
struct BoxSums {
  Pack<T> x1, y1, x2, y2;
};

// Spread `grad` over the four cells of a sample and add to the box gradient.
template <class T, bool kInput, bool kRois>
D2EXT_INLINE void sample_backward(
    const T* tile, T* tile_grad, const TileSample<T>& y, const TileSample<T>& x,
    const Pack<T>& grad, BoxSums<T>& sums) {
  const int cells[4] = {
      y.cell0 + x.cell0, y.cell0 + x.cell1, y.cell1 + x.cell0, y.cell1 + x.cell1};
  const T weights[4] = {
      y.weight0 * x.weight0, y.weight0 * x.weight1, y.weight1 * x.weight0, y.weight1 * x.weight1};
  if constexpr (kInput) {
    D2EXT_UNROLL
    for (int i = 0; i < 4; ++i) {
      Pack<T> cell = Pack<T>::load(tile_grad + cells[i]);
      cell.add(grad, weights[i]);
      cell.store(tile_grad + cells[i]);
    }
  }
  if constexpr (kRois) {
    const Pack<T> v00 = Pack<T>::load(tile + cells[0]), v01 = Pack<T>::load(tile + cells[1]);
    const Pack<T> v10 = Pack<T>::load(tile + cells[2]), v11 = Pack<T>::load(tile + cells[3]);
    Pack<T> by_x = v00.times(y.weight0 * x.slope0);
    by_x.add(v01, y.weight0 * x.slope1);
    by_x.add(v10, y.weight1 * x.slope0);
    by_x.add(v11, y.weight1 * x.slope1);
    Pack<T> by_y = v00.times(y.slope0 * x.weight0);
    by_y.add(v01, y.slope0 * x.weight1);
    by_y.add(v10, y.slope1 * x.weight0);
    by_y.add(v11, y.slope1 * x.weight1);
    Pack<T> gx = Pack<T>::fill(T(0)), gy = gx;
    gx.add(grad, by_x);
    gy.add(grad, by_y);
    sums.x1.add(gx, x.to_start);
    sums.x2.add(gx, x.to_end);
    sums.y1.add(gy, y.to_start);
    sums.y2.add(gy, y.to_end);
  }
}

template <class T, bool kInput, bool kRois>
D2EXT_INLINE void points_backward(
    const T* tile, T* tile_grad, const RoiSamples<T>& roi, const WarpSize& size, const T* buffer,
    BoxSums<T>& sums) {
  for (int p = 0; p < size.out_h; ++p) {
    const TileSample<T>& y = roi.rows[p];
    for (int q = 0; q < size.out_w; ++q, buffer += kLanes) {
      const TileSample<T>& x = roi.columns[q];
      if (!y.valid || !x.valid) continue;
      sample_backward<T, kInput, kRois>(tile, tile_grad, y, x, Pack<T>::load(buffer), sums);
    }
  }
}

template <class T, bool kInput, bool kRois, int kCount>
D2EXT_INLINE void maxima_backward(
    const T* tile, T* tile_grad, const RoiSamples<T>& roi, const WarpSize& size, const T* buffer,
    BoxSums<T>& sums) {
  const int ny = kCount ? kCount : roi.row_count, nx = kCount ? kCount : roi.column_count;
  Pack<T> winner;
  for (int p = 0; p < size.out_h; ++p) {
    const TileSample<T>* rows = roi.rows + p * ny;
    for (int q = 0; q < size.out_w; ++q, buffer += kLanes) {
      const TileSample<T>* columns = roi.columns + q * nx;
      bin_maximum<T, kCount>(tile, rows, columns, ny, nx, size.edge, winner);
      const Pack<T> grad = Pack<T>::load(buffer);
      for (int i = 0; i < ny; ++i) {
        for (int j = 0; j < nx; ++j) {
          if (!rows[i].valid || !columns[j].valid) continue;
          const Pack<T> share = grad.where(winner, static_cast<T>(i * nx + j));
          sample_backward<T, kInput, kRois>(tile, tile_grad, rows[i], columns[j], share, sums);
        }
      }
    }
  }
}

// ------------------------------------------------------------------ one task
enum class WarpKind { kPoint, kPool, kEdge };

// All RoIs of one image against sixteen of its channels.
template <class T>
struct WarpTask {
  WarpSize size;
  WarpKind kind;
  int lanes;
  ChannelView<const T> input;   // of the image
  ChannelView<T> output;        // forward: of RoI 0
  ChannelView<const T> grad;    // backward: of RoI 0
  ChannelView<T> input_grad;    // backward: of the image
  int64_t roi_stride;           // between RoIs in output and grad
  const int64_t* rois;          // RoI numbers
  int64_t roi_count;
  const RoiSamples<T>* samples;  // by RoI number
  T* box_grad;                   // backward: (N, 4), by RoI number
  T* tile;                       // scratch, cells * 16
  T* tile_grad;                  // scratch, cells * 16
  T* buffer;                     // scratch, bins * 16
};

template <class T>
D2EXT_INLINE void forward_task(const WarpTask<T>& task) {
  const int bins = task.size.out_h * task.size.out_w;
  load_view(task.input, task.lanes, static_cast<int>(task.size.cells), task.tile);
  for (int64_t i = 0; i < task.roi_count; ++i) {
    const int64_t roi = task.rois[i];
    const RoiSamples<T>& samples = task.samples[roi];
    if (task.kind == WarpKind::kPoint) {
      points_forward(task.tile, samples, task.size, task.buffer);
    } else if (task.kind == WarpKind::kPool) {
      maxima_forward<T, 2>(task.tile, samples, task.size, task.buffer);
    } else {
      maxima_forward<T, 0>(task.tile, samples, task.size, task.buffer);
    }
    ChannelView<T> output = task.output;
    output.base += roi * task.roi_stride;
    store_view(task.buffer, task.lanes, bins, output);
  }
}

template <class T, bool kInput, bool kRois>
D2EXT_INLINE void backward_task(const WarpTask<T>& task) {
  const int bins = task.size.out_h * task.size.out_w;
  const int cells = static_cast<int>(task.size.cells);
  if (kRois || task.kind != WarpKind::kPoint) {
    load_view(task.input, task.lanes, cells, task.tile);
  }
  if (kInput) std::memset(task.tile_grad, 0, sizeof(T) * kLanes * task.size.cells);
  for (int64_t i = 0; i < task.roi_count; ++i) {
    const int64_t roi = task.rois[i];
    const RoiSamples<T>& samples = task.samples[roi];
    ChannelView<const T> grad = task.grad;
    grad.base += roi * task.roi_stride;
    load_view(grad, task.lanes, bins, task.buffer);
    BoxSums<T> sums;
    sums.x1 = sums.y1 = sums.x2 = sums.y2 = Pack<T>::fill(T(0));
    if (task.kind == WarpKind::kPoint) {
      points_backward<T, kInput, kRois>(
          task.tile, task.tile_grad, samples, task.size, task.buffer, sums);
    } else if (task.kind == WarpKind::kPool) {
      maxima_backward<T, kInput, kRois, 2>(
          task.tile, task.tile_grad, samples, task.size, task.buffer, sums);
    } else {
      maxima_backward<T, kInput, kRois, 0>(
          task.tile, task.tile_grad, samples, task.size, task.buffer, sums);
    }
    if (kRois) {
      T* box = task.box_grad + roi * 4;
      box[0] = sums.x1.sum();
      box[1] = sums.y1.sum();
      box[2] = sums.x2.sum();
      box[3] = sums.y2.sum();
    }
  }
  if (kInput) store_view(task.tile_grad, task.lanes, cells, task.input_grad);
}

}  // namespace d2ext
