// Mask operators on the CPU: corner-anchored resize, gate, paste.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "pack.h"

namespace d2ext {
namespace {

// ------------------------------------------------------------------ resize and gate
template <class T>
std::vector<Lerp<T>> resize_axis(int64_t length, int64_t out) {
  std::vector<Lerp<T>> axis(out);
  for (int64_t i = 0; i < out; ++i) {
    axis[i] = resize_sample<T>(static_cast<int>(i), static_cast<int>(length), static_cast<int>(out));
  }
  return axis;
}

template <class T>
void resize_plane(
    const T* mask, int64_t width, const std::vector<Lerp<T>>& rows,
    const std::vector<Lerp<T>>& columns, T* output) {
  for (const Lerp<T>& y : rows) {
    const T* top = mask + y.cell0 * width;
    const T* low = mask + y.cell1 * width;
    for (const Lerp<T>& x : columns) {
      const T upper = top[x.cell0] * (T(1) - x.weight) + top[x.cell1] * x.weight;
      const T lower = low[x.cell0] * (T(1) - x.weight) + low[x.cell1] * x.weight;
      *output++ = y.valid && x.valid ? upper * (T(1) - y.weight) + lower * y.weight : T(0);
    }
  }
}

template <class T>
void resize_plane_transpose(
    const T* grad, int64_t height, int64_t width, const std::vector<Lerp<T>>& rows,
    const std::vector<Lerp<T>>& columns, T* mask_grad) {
  std::fill(mask_grad, mask_grad + height * width, T(0));
  for (const Lerp<T>& y : rows) {
    T* top = mask_grad + y.cell0 * width;
    T* low = mask_grad + y.cell1 * width;
    for (const Lerp<T>& x : columns) {
      const T value = *grad++;
      if (!y.valid || !x.valid) continue;
      top[x.cell0] += value * (T(1) - y.weight) * (T(1) - x.weight);
      top[x.cell1] += value * (T(1) - y.weight) * x.weight;
      low[x.cell0] += value * y.weight * (T(1) - x.weight);
      low[x.cell1] += value * y.weight * x.weight;
    }
  }
}

// `forward` resizes planes of `small` to `large`; else the transpose takes `large` back to `small`.
template <class T>
void resize_all(const at::Tensor& from, const at::Tensor& to, bool forward) {
  const at::Tensor& masks = forward ? from : to;
  const at::Tensor& output = forward ? to : from;
  const int64_t height = masks.size(2), width = masks.size(3);
  const auto rows = resize_axis<T>(height, output.size(2));
  const auto columns = resize_axis<T>(width, output.size(3));
  const int64_t from_size = from.size(2) * from.size(3), to_size = to.size(2) * to.size(3);
  const T* in = from.const_data_ptr<T>();
  T* out = to.mutable_data_ptr<T>();
  at::parallel_for(0, from.size(0) * from.size(1), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (forward) {
        resize_plane(in + i * from_size, width, rows, columns, out + i * to_size);
      } else {
        resize_plane_transpose(in + i * from_size, height, width, rows, columns, out + i * to_size);
      }
    }
  });
}

at::Tensor resize(const at::Tensor& from, int64_t height, int64_t width, bool forward) {
  check_resize("mask_resize", from, height, width);
  const at::Tensor data = from.to(accumulate_type(from)).contiguous();
  at::Tensor output = at::empty(
      {from.size(0), from.size(1), height, width},
      data.options().memory_format(at::MemoryFormat::Contiguous));
  if (output.numel() > 0) {
    data.scalar_type() == at::kDouble ? resize_all<double>(data, output, forward)
                                      : resize_all<float>(data, output, forward);
  }
  return output.to(from.scalar_type());
}

// Strides of (N, C, h, w) in either layout: between channels and between cells.
struct Layout {
  int64_t channel, cell;
  explicit Layout(const at::Tensor& tensor) {
    const bool last = layout_of(tensor) == at::MemoryFormat::ChannelsLast;
    channel = last ? 1 : tensor.size(2) * tensor.size(3);
    cell = last ? tensor.size(1) : 1;
  }
};

template <class T>
void gate_forward(const at::Tensor& features, const at::Tensor& masks, const at::Tensor& output) {
  const auto rows = resize_axis<T>(masks.size(2), features.size(2));
  const auto columns = resize_axis<T>(masks.size(3), features.size(3));
  const int64_t channels = features.size(1), cells = features.size(2) * features.size(3);
  const int64_t mask_size = masks.size(2) * masks.size(3);
  const Layout layout(features);
  const T* in = features.const_data_ptr<T>();
  const T* mask = masks.const_data_ptr<T>();
  T* out = output.mutable_data_ptr<T>();
  at::parallel_for(0, features.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> gate(cells);
    for (int64_t n = begin; n < end; ++n) {
      resize_plane(mask + n * mask_size, masks.size(3), rows, columns, gate.data());
      const T* from = in + n * channels * cells;
      T* to = out + n * channels * cells;
      if (layout.cell == 1) {
        for (int64_t c = 0; c < channels; ++c, from += cells, to += cells) {
          for (int64_t i = 0; i < cells; ++i) to[i] = from[i] * gate[i];
        }
      } else {
        for (int64_t i = 0; i < cells; ++i, from += channels, to += channels) {
          for (int64_t c = 0; c < channels; ++c) to[c] = from[c] * gate[i];
        }
      }
    }
  });
}

template <class T>
void gate_backward(
    const at::Tensor& grad, const at::Tensor& features, const at::Tensor& masks,
    const at::Tensor& features_grad, const at::Tensor& masks_grad) {
  const auto rows = resize_axis<T>(masks.size(2), features.size(2));
  const auto columns = resize_axis<T>(masks.size(3), features.size(3));
  const int64_t channels = features.size(1), cells = features.size(2) * features.size(3);
  const int64_t mask_size = masks.size(2) * masks.size(3);
  const Layout layout(features);
  const T* in = features.const_data_ptr<T>();
  const T* upstream = grad.const_data_ptr<T>();
  const T* mask = masks.const_data_ptr<T>();
  T* by_features = features_grad.mutable_data_ptr<T>();
  T* by_masks = masks_grad.mutable_data_ptr<T>();
  at::parallel_for(0, features.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> gate(cells), sums(cells);
    for (int64_t n = begin; n < end; ++n) {
      resize_plane(mask + n * mask_size, masks.size(3), rows, columns, gate.data());
      std::fill(sums.begin(), sums.end(), T(0));
      const int64_t base = n * channels * cells;
      const bool planar = layout.cell == 1;
      const int64_t outer = planar ? channels : cells, inner = planar ? cells : channels;
      for (int64_t i = 0; i < outer; ++i) {
        const int64_t at = base + i * inner;
        for (int64_t j = 0; j < inner; ++j) {
          const int64_t cell = planar ? j : i;
          by_features[at + j] = upstream[at + j] * gate[cell];
          sums[cell] += upstream[at + j] * in[at + j];
        }
      }
      resize_plane_transpose(
          sums.data(), masks.size(2), masks.size(3), rows, columns, by_masks + n * mask_size);
    }
  });
}

// ------------------------------------------------------------------ paste
template <class T>
struct PasteTask {
  const T* mask;  // (size, size)
  T x1, y1, x2, y2;
  int size, img_h, img_w;
  T threshold;
  bool as_bytes;
  uint8_t* output;  // (img_h, img_w)
  T* padded;        // scratch, size + 2
  T* weight;        // scratch, img_w
  int32_t* cell;    // scratch, img_w
};

template <class T>
D2EXT_INLINE void paste_one(const PasteTask<T>& task) {
  const uint8_t outside = !task.as_bytes && T(0) >= task.threshold ? 1 : 0;
  const T size = static_cast<T>(task.size);
  int first = task.img_w, last = 0;
  for (int x = 0; x < task.img_w; ++x) {
    const T position = paste_position(x, task.x1, task.x2, task.size);
    if (!(position > T(-1) && position < size)) continue;
    const T base = std::floor(position);
    task.cell[x] = static_cast<int32_t>(base) + 1;
    task.weight[x] = position - base;
    first = std::min(first, x);
    last = x + 1;
  }
  task.padded[0] = task.padded[task.size + 1] = T(0);
  for (int y = 0; y < task.img_h; ++y) {
    uint8_t* row = task.output + int64_t(y) * task.img_w;
    const T position = paste_position(y, task.y1, task.y2, task.size);
    if (first >= last || !(position > T(-1) && position < size)) {
      std::memset(row, outside, task.img_w);
      continue;
    }
    const T base = std::floor(position), b = position - base;
    const int cell = static_cast<int>(base);
    const T weight0 = cell >= 0 ? T(1) - b : T(0), weight1 = cell + 1 < task.size ? b : T(0);
    const T* upper = task.mask + int64_t(cell >= 0 ? cell : 0) * task.size;
    const T* lower = task.mask + int64_t(cell + 1 < task.size ? cell + 1 : cell) * task.size;
    for (int i = 0; i < task.size; ++i) {
      task.padded[i + 1] = upper[i] * weight0 + lower[i] * weight1;
    }
    std::memset(row, outside, first);
    std::memset(row + last, outside, task.img_w - last);
    const T* padded = task.padded;
    const T* weight = task.weight;
    const int32_t* cells = task.cell;
    if (task.as_bytes) {
      for (int x = first; x < last; ++x) {
        const T value =
            padded[cells[x]] * (T(1) - weight[x]) + padded[cells[x] + 1] * weight[x];
        const T scaled = value * T(255);
        row[x] = scaled > T(0) ? static_cast<uint8_t>(scaled < T(255) ? scaled : T(255)) : 0;
      }
    } else {
      const T threshold = task.threshold;
      for (int x = first; x < last; ++x) {
        const T value =
            padded[cells[x]] * (T(1) - weight[x]) + padded[cells[x] + 1] * weight[x];
        row[x] = value >= threshold;
      }
    }
  }
}

D2EXT_CLONES void run_paste(const PasteTask<float>& task) {
  paste_one(task);
}
void run_paste(const PasteTask<double>& task) {
  paste_one(task);
}

template <class T>
void paste_all(
    const at::Tensor& masks, const at::Tensor& boxes, double threshold, const at::Tensor& output) {
  const T* mask = masks.const_data_ptr<T>();
  const T* box = boxes.const_data_ptr<T>();
  const int size = static_cast<int>(masks.size(1));
  const int64_t area = output.size(1) * output.size(2);
  uint8_t* out = static_cast<uint8_t*>(output.mutable_data_ptr());
  at::parallel_for(0, masks.size(0), 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> padded(size + 2), weight(output.size(2));
    const Scratch<int32_t> cell(output.size(2));
    for (int64_t n = begin; n < end; ++n) {
      const T* b = box + n * 4;
      PasteTask<T> task{
          mask + n * size * size, b[0], b[1], b[2], b[3], size,
          static_cast<int>(output.size(1)), static_cast<int>(output.size(2)),
          static_cast<T>(threshold), threshold < 0, out + n * area, padded.get(), weight.get(),
          cell.get()};
      const bool solid = finite(b[0]) && finite(b[1]) && finite(b[2]) && finite(b[3]) &&
          b[2] > b[0] && b[3] > b[1];
      if (solid) {
        run_paste(task);
      } else {
        std::memset(task.output, 0, area);
      }
    }
  });
}

}  // namespace

at::Tensor mask_resize_cpu(const at::Tensor& masks, int64_t out_h, int64_t out_w) {
  return resize(masks, out_h, out_w, true);
}

at::Tensor mask_resize_backward_cpu(const at::Tensor& grad, int64_t mask_h, int64_t mask_w) {
  return resize(grad, mask_h, mask_w, false);
}

at::Tensor mask_gate_cpu(const at::Tensor& features, const at::Tensor& masks) {
  check_gate("mask_gate", features, masks);
  const auto layout = layout_of(features);
  const auto type = accumulate_type(features);
  const at::Tensor data = features.to(type).contiguous(layout);
  const at::Tensor gates = masks.to(type).contiguous();
  at::Tensor output = at::empty(features.sizes(), data.options().memory_format(layout));
  if (output.numel() > 0) {
    type == at::kDouble ? gate_forward<double>(data, gates, output)
                        : gate_forward<float>(data, gates, output);
  }
  return output.to(features.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> mask_gate_backward_cpu(
    const at::Tensor& grad, const at::Tensor& features, const at::Tensor& masks) {
  check_gate("mask_gate", features, masks);
  TORCH_CHECK(
      grad.sizes() == features.sizes() && grad.scalar_type() == features.scalar_type(),
      "mask_gate: grad must have the shape of features");
  const auto layout = layout_of(features);
  const auto type = accumulate_type(features);
  const at::Tensor data = features.to(type).contiguous(layout);
  const at::Tensor upstream = grad.to(type).contiguous(layout);
  const at::Tensor gates = masks.to(type).contiguous();
  at::Tensor features_grad = at::empty(features.sizes(), data.options().memory_format(layout));
  at::Tensor masks_grad = at::zeros(masks.sizes(), gates.options());
  if (features_grad.numel() > 0) {
    type == at::kDouble
        ? gate_backward<double>(upstream, data, gates, features_grad, masks_grad)
        : gate_backward<float>(upstream, data, gates, features_grad, masks_grad);
  }
  return {features_grad.to(features.scalar_type()), masks_grad.to(masks.scalar_type())};
}

at::Tensor paste_masks_cpu(
    const at::Tensor& masks, const at::Tensor& boxes, int64_t img_h, int64_t img_w,
    double threshold) {
  check_paste("paste_masks", masks, boxes, img_h, img_w);
  const auto type = accumulate_type(masks);
  const at::Tensor data = masks.to(type).contiguous();
  const at::Tensor corners = boxes.to(type).contiguous();
  at::Tensor output = at::empty(
      {masks.size(0), img_h, img_w}, masks.options().dtype(threshold < 0 ? at::kByte : at::kBool));
  type == at::kDouble ? paste_all<double>(data, corners, threshold, output)
                      : paste_all<float>(data, corners, threshold, output);
  return output;
}

TORCH_LIBRARY_IMPL(d2ext, CPU, library) {
  library.impl("mask_resize", &mask_resize_cpu);
  library.impl("mask_resize_backward", &mask_resize_backward_cpu);
  library.impl("mask_gate", &mask_gate_cpu);
  library.impl("mask_gate_backward", &mask_gate_backward_cpu);
  library.impl("paste_masks", &paste_masks_cpu);
}

}  // namespace d2ext
