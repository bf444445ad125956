// Limits and small helpers of the host code.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "geometry.h"

namespace d2ext {

constexpr int64_t kMaxWarpSize = 64;
constexpr int64_t kMaxAlignSize = 256;  // finer bins included
constexpr int64_t kMaxSampling = 64;
constexpr int64_t kMaxLevels = 8;
constexpr int64_t kMaxPsSize = 128;
constexpr int64_t kMaxMaskSize = 512;

inline bool is_half(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

inline at::ScalarType accumulate_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// channels_last only when the tensor has that layout and no other.
inline at::MemoryFormat layout_of(const at::Tensor& tensor) {
  const bool last = !tensor.is_contiguous() && tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The level of every row, -1 where it has none: detectron2's `assign_boxes_to_levels`, operation by
// operation in torch, so that no box changes its level by rounding.
inline at::Tensor pyramid_levels(
    const at::Tensor& rois, at::ArrayRef<double> scales, double canonical_size,
    int64_t canonical_level) {
  if (scales.size() == 1) return at::zeros({rois.size(0)}, rois.options().dtype(at::kInt));
  const double first = std::round(-std::log2(scales.front()));
  const at::Tensor area = (rois.select(1, 3) - rois.select(1, 1)) *
      (rois.select(1, 4) - rois.select(1, 2));
  const at::Tensor level =
      ((area.sqrt() / canonical_size + 1e-8).log2() + canonical_level).floor().clamp(
          first, first + static_cast<double>(scales.size() - 1));
  return (level - first).nan_to_num(-1.0).to(at::kInt);
}

}  // namespace d2ext
