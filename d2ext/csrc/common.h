// Limits and small helpers of the host code.
#pragma once

#include <ATen/core/Tensor.h>

#include "geometry.h"

namespace d2ext {

constexpr int64_t kMaxWarpSize = 64;
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

}  // namespace d2ext
