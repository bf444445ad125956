// Arithmetic of pyramid RoI align on sixteen channels. No torch here: pyramid_roi_align.cpp feeds it.
//
// The samples of a box are a grid, so the weight of a cell in a bin is a product of one weight per axis.
// All samples of a bin are merged into one list of taps per axis, and a box takes two passes: along x
// over each row of cells that it reads, then along y from this row into the bins.
#pragma once

#include <vector>

#include "../geometry.h"
#include "pack.h"

namespace d2ext {

template <class T>
struct Tap {
  int at;  // offset of a cell, or of a bin
  T weight;
};

// Lists of taps, one behind the other: list i is taps[first[i]] .. taps[first[i + 1]].
template <class T>
struct TapLists {
  std::vector<Tap<T>> taps;
  std::vector<size_t> first{0};

  void close() {
    first.push_back(taps.size());
  }
  size_t count() const {
    return first.size() - 1;
  }
};

// What a box reads. Lists are numbers of the first one of the box in `Taps`.
struct BoxPlan {
  int64_t roi;
  int top, bottom, left, right;  // cells, half-open; empty when the box lies outside
  size_t rows;     // a list per row of cells: bins along y
  size_t columns;  // forward: a list per bin along x: cells; backward: per column of cells: bins
};

template <class T>
struct Taps {
  TapLists<T> rows, columns;
};

// The taps of every bin along one axis; `at` is a cell.
template <class T>
void bin_taps(
    const AlignSpan<T>& span, int length, int bins, int average, TapLists<T>& lists) {
  const T share = T(1) / (static_cast<T>(span.count) * static_cast<T>(average));
  for (int bin = 0; bin < bins; ++bin) {
    const auto add = [&](int cell, T weight) {
      if (weight == T(0)) return;
      const size_t start = lists.first.back(), end = lists.taps.size();
      // samples come in order, so the cell is among the last ones
      for (size_t i = end; i > start && i + 3 > end; --i) {
        if (lists.taps[i - 1].at == cell) {
          lists.taps[i - 1].weight += weight;
          return;
        }
      }
      lists.taps.push_back({cell, weight});
    };
    for (int fine = bin * average; fine < (bin + 1) * average; ++fine) {
      const CellRange range = align_range(span, fine, length);
      for (int sub = range.first; sub < range.last; ++sub) {
        const AlignSample<T> sample = align_sample(span, fine, sub, length);
        if (!sample.valid) continue;
        add(sample.cell0, sample.weight0 * share);
        add(sample.cell1, sample.weight1 * share);
      }
    }
    lists.close();
  }
}

// The cells between the first and the last that bins read.
template <class T>
CellRange cells_of(const TapLists<T>& bins) {
  CellRange range = {0, 0};
  for (size_t i = 0; i < bins.taps.size(); ++i) {
    const int cell = bins.taps[i].at;
    if (i == 0 || cell < range.first) range.first = cell;
    if (i == 0 || cell >= range.last) range.last = cell + 1;
  }
  return range;
}

// The same taps by cell: a list for each cell of `range`, `at` is a bin times `step`.
template <class T>
void turn_around(
    const TapLists<T>& bins, CellRange range, int step, std::vector<size_t>& counts,
    TapLists<T>& lists) {
  counts.assign(range.last - range.first + 1, 0);
  for (const Tap<T>& tap : bins.taps) ++counts[tap.at - range.first + 1];
  const size_t base = lists.taps.size();
  for (int i = 0; i < range.last - range.first; ++i) {
    counts[i + 1] += counts[i];
    lists.first.push_back(base + counts[i + 1]);
  }
  lists.taps.resize(base + bins.taps.size());
  for (size_t bin = 0; bin < bins.count(); ++bin) {
    for (size_t i = bins.first[bin]; i < bins.first[bin + 1]; ++i) {
      const Tap<T>& tap = bins.taps[i];
      lists.taps[base + counts[tap.at - range.first]++] = {static_cast<int>(bin) * step, tap.weight};
    }
  }
}

// The last `period` rows of a level, [row][cell][16].
template <class T>
struct Ring {
  T* base;
  int64_t stride;  // elements of a row
  int period;

  D2EXT_INLINE T* row(int number) const {
    return base + (number % period) * stride;
  }
};

// buffer: [bin][16].
template <class T>
D2EXT_INLINE void box_forward(
    const BoxPlan& box, const Taps<T>& taps, const Ring<T>& map, int out_h, int out_w,
    T* buffer) {
  const int bins = out_h * out_w;
  for (int i = 0; i < bins; ++i) Pack<T>::fill(T(0)).store(buffer + i * kLanes);
  const size_t* column_lists = taps.columns.first.data() + box.columns;
  const size_t* row_lists = taps.rows.first.data() + box.rows;
  const Tap<T>* const column_taps = taps.columns.taps.data();
  const Tap<T>* const row_taps = taps.rows.taps.data();
  for (int y = box.top; y < box.bottom; ++y, ++row_lists) {
    const Tap<T>* const first = row_taps + row_lists[0];
    const Tap<T>* const last = row_taps + row_lists[1];
    if (first == last) continue;
    const T* const row = map.row(y);
    for (int q = 0; q < out_w; ++q) {
      const Tap<T>* tap = column_taps + column_lists[q];
      const Tap<T>* const end = column_taps + column_lists[q + 1];
      if (tap == end) continue;
      Pack<T> value = Pack<T>::load(row + tap->at).times(tap->weight);
      for (++tap; tap != end; ++tap) value.add(Pack<T>::load(row + tap->at), tap->weight);
      for (const Tap<T>* bin = first; bin != last; ++bin) {
        T* const to = buffer + bin->at + q * kLanes;
        Pack<T> sum = Pack<T>::load(to);
        sum.add(value, bin->weight);
        sum.store(to);
      }
    }
  }
}

// The transpose: adds to `map`. `line` is scratch of out_w * 16.
template <class T>
D2EXT_INLINE void box_backward(
    const BoxPlan& box, const Taps<T>& taps, const Ring<T>& map, int out_w, const T* buffer,
    T* line) {
  const size_t* row_lists = taps.rows.first.data() + box.rows;
  const Tap<T>* const column_taps = taps.columns.taps.data();
  const Tap<T>* const row_taps = taps.rows.taps.data();
  for (int y = box.top; y < box.bottom; ++y, ++row_lists) {
    const Tap<T>* const first = row_taps + row_lists[0];
    const Tap<T>* const last = row_taps + row_lists[1];
    if (first == last) continue;
    for (int q = 0; q < out_w; ++q) {
      const T* const from = buffer + q * kLanes;
      Pack<T> value = Pack<T>::load(from + first->at).times(first->weight);
      for (const Tap<T>* bin = first + 1; bin != last; ++bin) {
        value.add(Pack<T>::load(from + bin->at), bin->weight);
      }
      value.store(line + q * kLanes);
    }
    T* cell = map.row(y) + box.left * kLanes;
    const size_t* column_lists = taps.columns.first.data() + box.columns;
    for (int x = box.left; x < box.right; ++x, ++column_lists, cell += kLanes) {
      const Tap<T>* tap = column_taps + column_lists[0];
      const Tap<T>* const end = column_taps + column_lists[1];
      if (tap == end) continue;
      Pack<T> sum = Pack<T>::load(cell);
      for (; tap != end; ++tap) sum.add(Pack<T>::load(line + tap->at), tap->weight);
      sum.store(cell);
    }
  }
}

// ------------------------------------------------------------------ one task
// Boxes of one image and level, those further up first, with the cells of a row that any of them reads.
template <class T>
struct LevelPlan {
  int height = 0, width = 0;
  int ring = 1;  // rows that one box spans at most
  std::vector<BoxPlan> boxes;
  std::vector<CellRange> spans;
};

// Some boxes of a level against sixteen channels.
template <class T>
struct PyramidTask {
  const LevelPlan<T>* level;
  const Taps<T>* taps;
  int out_h, out_w, lanes;
  ChannelView<const T> input;  // forward: of the image
  ChannelView<T> output;       // forward: of RoI 0
  ChannelView<const T> grad;   // backward: of RoI 0
  ChannelView<T> input_grad;   // backward: of the image
  int64_t roi_stride;          // between RoIs in output and grad
  size_t first_box, last_box;
  T* ring;                     // scratch, ring rows * width * 16
  T* buffer;                   // scratch, bins * 16
  T* line;                     // scratch, out_w * 16; backward
};

template <class View>
D2EXT_INLINE View moved(View view, int64_t elements) {
  view.base += elements;
  return view;
}

template <class T>
D2EXT_INLINE void forward_boxes(const PyramidTask<T>& task) {
  const LevelPlan<T>& level = *task.level;
  const Ring<T> ring = {task.ring, int64_t(level.width) * kLanes, level.ring};
  int loaded = 0;  // rows before this one are in the ring, or not needed any more
  for (size_t i = task.first_box; i < task.last_box; ++i) {
    const BoxPlan& box = level.boxes[i];
    for (int y = std::max(loaded, box.top); y < box.bottom; ++y) {
      const CellRange span = level.spans[y];
      const int64_t cell = int64_t(y) * level.width + span.first;
      load_view<T>(
          moved(task.input, cell * task.input.cell), task.lanes, span.last - span.first,
          ring.row(y) + span.first * kLanes);
    }
    loaded = std::max(loaded, box.bottom);
    box_forward(box, *task.taps, ring, task.out_h, task.out_w, task.buffer);
    store_view(
        task.buffer, task.lanes, task.out_h * task.out_w,
        moved(task.output, box.roi * task.roi_stride));
  }
}

// Zeros in cells first .. last - 1 of a row of the gradient.
template <class T>
D2EXT_INLINE void zero_cells(const PyramidTask<T>& task, int y, int first, int last) {
  const ChannelView<T>& view = task.input_grad;
  T* const to = view.base + (int64_t(y) * task.level->width + first) * view.cell;
  if (view.cell == 1) {
    for (int lane = 0; lane < task.lanes; ++lane) {
      std::memset(to + lane * view.lane, 0, sizeof(T) * (last - first));
    }
    return;
  }
  for (int x = 0; x < last - first; ++x) {
    for (int lane = 0; lane < task.lanes; ++lane) to[x * view.cell + lane * view.lane] = T(0);
  }
}

// Write rows begin .. end - 1 of the gradient: what the ring holds of them, 0 elsewhere.
template <class T>
D2EXT_INLINE void flush_rows(
    const PyramidTask<T>& task, const Ring<T>& ring, int begin, int end) {
  const LevelPlan<T>& level = *task.level;
  for (int y = begin; y < end; ++y) {
    const CellRange span = level.spans[y];
    if (span.last > span.first) {
      const int64_t cell = int64_t(y) * level.width + span.first;
      store_view<T>(
          ring.row(y) + span.first * kLanes, task.lanes, span.last - span.first,
          moved(task.input_grad, cell * task.input_grad.cell));
    }
    zero_cells(task, y, 0, span.first);
    zero_cells(task, y, span.last, level.width);
  }
}

template <class T>
D2EXT_INLINE void backward_boxes(const PyramidTask<T>& task) {
  const LevelPlan<T>& level = *task.level;
  const Ring<T> ring = {task.ring, int64_t(level.width) * kLanes, level.ring};
  int opened = 0, flushed = 0;
  for (size_t i = task.first_box; i < task.last_box; ++i) {
    const BoxPlan& box = level.boxes[i];
    load_view(
        moved(task.grad, box.roi * task.roi_stride), task.lanes, task.out_h * task.out_w,
        task.buffer);
    flush_rows(task, ring, flushed, box.top);
    flushed = std::max(flushed, box.top);
    for (int y = std::max(opened, box.top); y < box.bottom; ++y) {
      const CellRange span = level.spans[y];
      std::memset(
          ring.row(y) + span.first * kLanes, 0, sizeof(T) * kLanes * (span.last - span.first));
    }
    opened = std::max(opened, box.bottom);
    box_backward(box, *task.taps, ring, task.out_w, task.buffer, task.line);
  }
  flush_rows(task, ring, flushed, level.height);
}

}  // namespace d2ext
