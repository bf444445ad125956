// Mask voting on the CPU. Each voter is drawn once, into its clipped box; results add weighted voters up
// in a buffer as large as the union of their boxes.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "pack.h"

namespace d2ext {
namespace {

struct Region {
  CellRange rows, columns;
  int64_t first;  // of its values in the store of drawn masks
  bool empty() const {
    return rows.first >= rows.last || columns.first >= columns.last;
  }
  int width() const {
    return columns.last - columns.first;
  }
  int64_t area() const {
    return int64_t(rows.last - rows.first) * width();
  }
};

template <class T>
T lerp_plane(const T* plane, int64_t width, Lerp<T> y, Lerp<T> x, int height_limit, int width_limit,
             bool corner) {
  if (corner && (y.cell0 == height_limit - 1 || x.cell0 == width_limit - 1)) {
    return plane[y.cell0 * width + x.cell0];
  }
  const T* top = plane + y.cell0 * width;
  const T* low = plane + y.cell1 * width;
  const T upper = top[x.cell0] * (T(1) - x.weight) + top[x.cell1] * x.weight;
  const T lower = low[x.cell0] * (T(1) - x.weight) + low[x.cell1] * x.weight;
  return upper * (T(1) - y.weight) + lower * y.weight;
}

// D is uint8_t for masks made binary, else T.
template <class T, class D>
void draw_mask(const T* mask, int size, const T* box, const Region& region, T thresh,
               VoteMode mode, D* to) {
  const bool corner = mode == VoteMode::kMnc;
  std::vector<Lerp<T>> columns;
  for (int x = region.columns.first; x < region.columns.last; ++x) {
    columns.push_back(lerp_clamped(vote_position(x, box[0], box[2], size, mode), size));
  }
  for (int row = region.rows.first; row < region.rows.last; ++row) {
    const Lerp<T> y = lerp_clamped(vote_position(row, box[1], box[3], size, mode), size);
    for (const Lerp<T>& x : columns) {
      const T value = lerp_plane(mask, size, y, x, size, size, corner);
      *to++ = corner ? static_cast<D>(value) : static_cast<D>(value >= thresh);
    }
  }
}

template <class T, class D>
D2EXT_INLINE void add_region(
    const D* from, const Region& region, const Region& whole, T weight, T* total) {
  const int width = region.width();
  for (int row = region.rows.first; row < region.rows.last; ++row, from += width) {
    T* to = total + int64_t(row - whole.rows.first) * whole.width() +
        (region.columns.first - whole.columns.first);
    for (int i = 0; i < width; ++i) to[i] += weight * static_cast<T>(from[i]);
  }
}

D2EXT_CLONES void run_add(
    const uint8_t* from, const Region& region, const Region& whole, float weight, float* total) {
  add_region(from, region, whole, weight, total);
}
D2EXT_CLONES void run_add(
    const float* from, const Region& region, const Region& whole, float weight, float* total) {
  add_region(from, region, whole, weight, total);
}
void run_add(
    const uint8_t* from, const Region& region, const Region& whole, double weight, double* total) {
  add_region(from, region, whole, weight, total);
}
void run_add(
    const double* from, const Region& region, const Region& whole, double weight, double* total) {
  add_region(from, region, whole, weight, total);
}

template <class T>
struct VoteInput {
  const T* masks;
  std::vector<T> boxes;  // (N, 4), as the mode uses them
  int size, img_h, img_w;
  T thresh;
  VoteMode mode;
  const int32_t* index;
  const int32_t* offset;
  const float* weight;
};

// Tight inclusive box x1, y1, x2, y2 of the pixels that reach the threshold.
template <class T>
void tight_box(const VoteInput<T>& in, const T* total, const Region& whole, int32_t* box) {
  int first_x = in.img_w, last_x = -1, first_y = in.img_h, last_y = -1;
  const bool strict = in.mode == VoteMode::kMnc;
  const int width = whole.width();
  for (int y = whole.rows.first; y < whole.rows.last; ++y) {
    const T* row = total + int64_t(y - whole.rows.first) * width;
    const auto reached = [&](int i) { return strict ? row[i] > in.thresh : row[i] >= in.thresh; };
    int left = 0;
    while (left < width && !reached(left)) ++left;
    if (left == width) continue;
    int right = width - 1;
    while (!reached(right)) --right;
    first_x = std::min(first_x, whole.columns.first + left);
    last_x = std::max(last_x, whole.columns.first + right);
    if (last_y < 0) first_y = y;
    last_y = y;
  }
  if (last_y >= 0) {
    box[0] = first_x, box[1] = first_y, box[2] = last_x, box[3] = last_y;
    return;
  }
  const bool up = in.mode == VoteMode::kCrop;  // the CPU variants round the centre up
  box[0] = box[2] = std::min((in.img_w + (up ? 1 : 0)) / 2, in.img_w - 1);
  box[1] = box[3] = std::min((in.img_h + (up ? 1 : 0)) / 2, in.img_h - 1);
}

template <class T>
void recrop(const VoteInput<T>& in, const T* total, const Region& whole, const int32_t* box, T* mask) {
  const bool corner = in.mode == VoteMode::kMnc, crop = in.mode == VoteMode::kCrop;
  const int x0 = crop ? box[0] : 0, y0 = crop ? box[1] : 0;
  const int width = crop ? box[2] - box[0] + 1 : in.img_w;
  const int height = crop ? box[3] - box[1] + 1 : in.img_h;
  const auto read = [&](int y, int x) {
    y += y0, x += x0;
    const bool inside = y >= whole.rows.first && y < whole.rows.last &&
        x >= whole.columns.first && x < whole.columns.last;
    return inside ? total[int64_t(y - whole.rows.first) * whole.width() + x - whole.columns.first]
                  : T(0);
  };
  for (int i = 0; i < in.size; ++i) {
    const Lerp<T> y = lerp_clamped(
        recrop_position<T>(i, box[1], box[3], in.size, in.mode), height);
    for (int j = 0; j < in.size; ++j) {
      const Lerp<T> x = lerp_clamped(
          recrop_position<T>(j, box[0], box[2], in.size, in.mode), width);
      if (corner && (y.cell0 == height - 1 || x.cell0 == width - 1)) {
        *mask++ = read(y.cell0, x.cell0);
        continue;
      }
      const T upper = read(y.cell0, x.cell0) * (T(1) - x.weight) + read(y.cell0, x.cell1) * x.weight;
      const T lower = read(y.cell1, x.cell0) * (T(1) - x.weight) + read(y.cell1, x.cell1) * x.weight;
      *mask++ = upper * (T(1) - y.weight) + lower * y.weight;
    }
  }
}

template <class T, class D>
void vote_all(const VoteInput<T>& in, int64_t voters, int64_t results, T* out_masks, int32_t* out_boxes) {
  std::vector<Region> regions(voters, Region{{0, 0}, {0, 0}, -1});
  std::vector<int64_t> used;
  int64_t stored = 0;
  for (int32_t entry = 0; entry < in.offset[results]; ++entry) {
    Region& region = regions[in.index[entry]];
    if (region.first >= 0) continue;
    const T* box = in.boxes.data() + int64_t(in.index[entry]) * 4;
    if (finite(box[0]) && finite(box[1]) && finite(box[2]) && finite(box[3])) {
      region.columns = vote_span(box[0], box[2], in.img_w);
      region.rows = vote_span(box[1], box[3], in.img_h);
    }
    region.first = stored;
    if (region.empty()) continue;
    stored += region.area();
    used.push_back(in.index[entry]);
  }
  const Scratch<D> drawn(stored);
  at::parallel_for(0, static_cast<int64_t>(used.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Region& region = regions[used[i]];
      draw_mask<T, D>(
          in.masks + used[i] * in.size * in.size, in.size, in.boxes.data() + used[i] * 4, region,
          in.thresh, in.mode, drawn.get() + region.first);
    }
  });
  // a threshold that 0 reaches makes pixels outside all boxes count
  const bool zero_counts = in.mode == VoteMode::kMnc ? T(0) > in.thresh : T(0) >= in.thresh;
  at::parallel_for(0, results, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> total;
    for (int64_t result = begin; result < end; ++result) {
      Region whole{{in.img_h, 0}, {in.img_w, 0}, 0};
      if (zero_counts) whole = Region{{0, in.img_h}, {0, in.img_w}, 0};
      for (int32_t entry = in.offset[result]; entry < in.offset[result + 1]; ++entry) {
        const Region& region = regions[in.index[entry]];
        if (region.empty()) continue;
        whole.rows.first = std::min(whole.rows.first, region.rows.first);
        whole.rows.last = std::max(whole.rows.last, region.rows.last);
        whole.columns.first = std::min(whole.columns.first, region.columns.first);
        whole.columns.last = std::max(whole.columns.last, region.columns.last);
      }
      if (whole.empty()) whole = Region{{0, 0}, {0, 0}, 0};
      total.assign(whole.area(), T(0));
      for (int32_t entry = in.offset[result]; entry < in.offset[result + 1]; ++entry) {
        const Region& region = regions[in.index[entry]];
        if (region.empty()) continue;
        run_add(
            drawn.get() + region.first, region, whole, static_cast<T>(in.weight[entry]),
            total.data());
      }
      int32_t* box = out_boxes + result * 4;
      tight_box(in, total.data(), whole, box);
      recrop(in, total.data(), whole, box, out_masks + result * in.size * in.size);
    }
  });
}

template <class T>
void vote(
    const at::Tensor& masks, const at::Tensor& boxes, const at::Tensor& index,
    const at::Tensor& offset, const at::Tensor& weight, int64_t img_h, int64_t img_w,
    double thresh, VoteMode mode, const at::Tensor& out_masks, const at::Tensor& out_boxes) {
  VoteInput<T> in{
      masks.const_data_ptr<T>(), {}, static_cast<int>(masks.size(1)), static_cast<int>(img_h),
      static_cast<int>(img_w), static_cast<T>(thresh), mode, index.const_data_ptr<int32_t>(),
      offset.const_data_ptr<int32_t>(), weight.const_data_ptr<float>()};
  const T* corners = boxes.const_data_ptr<T>();
  for (int64_t i = 0; i < boxes.numel(); ++i) {
    in.boxes.push_back(mode == VoteMode::kMnc ? corners[i] : std::nearbyint(corners[i]));
  }
  const int64_t results = offset.size(0) - 1;
  if (mode == VoteMode::kMnc) {
    vote_all<T, T>(
        in, masks.size(0), results, out_masks.mutable_data_ptr<T>(),
        out_boxes.mutable_data_ptr<int32_t>());
  } else {
    vote_all<T, uint8_t>(
        in, masks.size(0), results, out_masks.mutable_data_ptr<T>(),
        out_boxes.mutable_data_ptr<int32_t>());
  }
}

void check_candidates(const at::Tensor& index, const at::Tensor& offset, int64_t voters) {
  const int32_t* offsets = offset.const_data_ptr<int32_t>();
  const int32_t* numbers = index.const_data_ptr<int32_t>();
  bool rising = offsets[0] == 0 && offsets[offset.size(0) - 1] == index.size(0);
  for (int64_t i = 1; i < offset.size(0); ++i) rising = rising && offsets[i] >= offsets[i - 1];
  TORCH_CHECK(rising, "mask_vote: cand_offset must rise from 0 to the number of candidates");
  bool inside = true;
  for (int64_t i = 0; i < index.size(0); ++i) {
    inside = inside && numbers[i] >= 0 && numbers[i] < voters;
  }
  TORCH_CHECK(inside, "mask_vote: cand_index must lie in 0..N-1");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> mask_vote_cpu(
    const at::Tensor& masks, const at::Tensor& boxes, const at::Tensor& cand_index,
    const at::Tensor& cand_offset, const at::Tensor& cand_weight, int64_t img_h, int64_t img_w,
    double binary_thresh, c10::string_view mode) {
  const VoteMode rule = check_vote(
      "mask_vote", masks, boxes, cand_index, cand_offset, cand_weight, img_h, img_w, mode);
  const at::Tensor index = cand_index.contiguous(), offset = cand_offset.contiguous();
  const at::Tensor weight = cand_weight.contiguous();
  check_candidates(index, offset, masks.size(0));
  const auto type = accumulate_type(masks);
  const at::Tensor data = masks.to(type).contiguous();
  const at::Tensor corners = boxes.to(type).contiguous();
  const int64_t results = offset.size(0) - 1;
  at::Tensor out_masks = at::empty({results, masks.size(1), masks.size(2)}, data.options());
  at::Tensor out_boxes = at::empty({results, 4}, index.options());
  if (type == at::kDouble) {
    vote<double>(
        data, corners, index, offset, weight, img_h, img_w, binary_thresh, rule, out_masks,
        out_boxes);
  } else {
    vote<float>(
        data, corners, index, offset, weight, img_h, img_w, binary_thresh, rule, out_masks,
        out_boxes);
  }
  return {out_masks.to(masks.scalar_type()), out_boxes};
}

TORCH_LIBRARY_IMPL(d2ext, CPU, library) {
  library.impl("mask_vote", &mask_vote_cpu);
}

}  // namespace d2ext
