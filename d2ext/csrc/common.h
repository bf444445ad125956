// Argument checks and small helpers of the host code. The messages are those of d2ext/ops/_checks.py
// and the reference modules.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>
#include <vector>

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

void check_floating(const char* op, const char* name, const at::Tensor& tensor, int64_t dim);
void check_coordinates(
    const char* op, const char* name, const at::Tensor& boxes, int64_t columns,
    const at::Tensor& like);
void check_scale(const char* op, double scale);

WarpRule warp_rule(
    const char* op, bool aligned, bool legacy, c10::string_view border,
    c10::string_view bin_reduce);
void check_warp(
    const char* op, const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h,
    int64_t out_w);
void check_warp_gradient(
    const char* op, const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    int64_t out_h, int64_t out_w);
void check_ps(
    const char* op, const char* name, const at::Tensor& input, const at::Tensor& rois,
    double scale, int64_t group_size, int64_t out_size, int64_t sides);
void check_ps_gradient(
    const char* op, const at::Tensor& grad, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, at::IntArrayRef input_size);
void check_pick(const char* op, const at::Tensor& pick, const at::Tensor& score, int64_t count);
void check_head_gradient(
    const char* op, const std::optional<at::Tensor>& grad_cls,
    const std::optional<at::Tensor>& grad_seg, const at::Tensor& score, int64_t count,
    int64_t classes, int64_t out_size);
void check_resize(const char* op, const at::Tensor& masks, int64_t out_h, int64_t out_w);
void check_gate(const char* op, const at::Tensor& features, const at::Tensor& masks);
void check_paste(
    const char* op, const at::Tensor& masks, const at::Tensor& boxes, int64_t img_h,
    int64_t img_w);
VoteMode check_vote(
    const char* op, const at::Tensor& masks, const at::Tensor& boxes, const at::Tensor& index,
    const at::Tensor& offset, const at::Tensor& weight, int64_t img_h, int64_t img_w,
    c10::string_view mode);

}  // namespace d2ext
