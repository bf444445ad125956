// Argument checks, the same on every device. The messages are those of d2ext/ops/_checks.py and the
// reference modules.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

#include "common.h"

namespace d2ext {

inline void check_floating(const char* op, const char* name, const at::Tensor& tensor, int64_t dim) {
  TORCH_CHECK(
      tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", tensor.dim());
  const auto type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || is_half(tensor), op, ": ", name,
      " must be float32, float64, float16 or bfloat16");
  for (int64_t i = 1; i < dim; ++i) {
    TORCH_CHECK(
        tensor.size(i) < std::numeric_limits<int>::max(), op, ": ", name, " is too large");
  }
}

inline void check_coordinates(
    const char* op, const char* name, const at::Tensor& boxes, int64_t columns,
    const at::Tensor& like) {
  TORCH_CHECK(
      boxes.dim() == 2 && boxes.size(1) == columns, op, ": ", name, " must have shape (N, ",
      columns, ")");
  TORCH_CHECK(
      boxes.device() == like.device(), op, ": ", name, " must be on the device of the data");
  TORCH_CHECK(
      boxes.scalar_type() == at::kFloat ||
          (boxes.scalar_type() == at::kDouble && like.scalar_type() == at::kDouble),
      op, ": ", name,
      " must be float32 (float64 only beside float64 data):"
      " half precision cannot hold pixel coordinates");
}

inline void check_scale(const char* op, double scale) {
  TORCH_CHECK(
      scale > 0 && scale < std::numeric_limits<double>::infinity(), op,
      ": spatial_scale must be positive and finite");
}

inline WarpRule warp_rule(
    const char* op, bool aligned, bool quantize, c10::string_view border,
    c10::string_view bin_reduce) {
  TORCH_CHECK(
      border == "clamp_half" || border == "zeros", op,
      ": border must be one of clamp_half, zeros");
  TORCH_CHECK(
      bin_reduce == "point" || bin_reduce == "edge_max", op,
      ": bin_reduce must be one of point, edge_max");
  return WarpRule{aligned, quantize, border == "zeros", bin_reduce == "edge_max"};
}

inline void check_warp(
    const char* op, const at::Tensor& input, const at::Tensor& rois, double scale, int64_t out_h,
    int64_t out_w) {
  check_floating(op, "input", input, 4);
  check_coordinates(op, "rois", rois, 5, input);
  check_scale(op, scale);
  TORCH_CHECK(
      out_h >= 1 && out_h <= kMaxWarpSize && out_w >= 1 && out_w <= kMaxWarpSize, op,
      ": output size must lie in 1..", kMaxWarpSize);
  TORCH_CHECK(
      input.size(2) * input.size(3) < std::numeric_limits<int>::max() / 16, op,
      ": input is too large");
}

inline void check_warp_gradient(
    const char* op, const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,
    int64_t out_h, int64_t out_w) {
  TORCH_CHECK(
      grad.dim() == 4 && grad.size(0) == rois.size(0) && grad.size(1) == input.size(1) &&
          grad.size(2) == out_h && grad.size(3) == out_w &&
          grad.scalar_type() == input.scalar_type() && grad.device() == input.device(),
      op, ": grad must have shape, dtype and device of the output");
}

// A pyramid: what both directions of its RoI align are given beside the data.
inline void check_pyramid(
    const char* op, int64_t levels, const at::Tensor& rois, const at::Tensor& like,
    at::ArrayRef<double> scales, int64_t out_h, int64_t out_w, int64_t sampling_ratio,
    int64_t average, double canonical_size) {
  TORCH_CHECK(
      1 <= levels && levels <= kMaxLevels && levels == static_cast<int64_t>(scales.size()), op,
      ": 1..", kMaxLevels, " feature levels with a scale each are needed");
  for (size_t i = 0; i < scales.size(); ++i) {
    check_scale(op, scales[i]);
    TORCH_CHECK(
        i == 0 || scales[i] * 2 == scales[i - 1], op,
        ": every scale must be half of the one before");
  }
  TORCH_CHECK(
      scales.size() == 1 || std::exp2(std::round(std::log2(scales[0]))) == scales[0], op,
      ": scales of several levels must be powers of two");
  check_coordinates(op, "rois", rois, 5, like);
  TORCH_CHECK(
      average >= 1 && out_h >= 1 && out_w >= 1 && out_h * average <= kMaxAlignSize &&
          out_w * average <= kMaxAlignSize,
      op, ": output size times average must lie in 1..", kMaxAlignSize);
  TORCH_CHECK(
      0 <= sampling_ratio && sampling_ratio <= kMaxSampling, op,
      ": sampling_ratio must lie in 0..", kMaxSampling);
  TORCH_CHECK(
      canonical_size > 0 && canonical_size < std::numeric_limits<double>::infinity(), op,
      ": canonical_size must be positive and finite");
}

inline void check_pyramid_features(const char* op, at::TensorList features) {
  for (const at::Tensor& feature : features) {
    check_floating(op, "features", feature, 4);
    TORCH_CHECK(
        feature.size(0) == features[0].size(0) && feature.size(1) == features[0].size(1) &&
            feature.scalar_type() == features[0].scalar_type() &&
            feature.device() == features[0].device(),
        op, ": images, channels, dtype and device of all feature levels must be equal");
    TORCH_CHECK(
        feature.size(2) * feature.size(3) < std::numeric_limits<int>::max() / 16, op,
        ": features are too large");
  }
}

// sizes: images, channels, then height and width of every level.
inline void check_pyramid_gradient(
    const char* op, const at::Tensor& grad, const at::Tensor& rois, at::IntArrayRef sizes) {
  check_floating(op, "grad", grad, 4);
  TORCH_CHECK(
      sizes.size() >= 4 && sizes.size() % 2 == 0, op,
      ": sizes must be images, channels, and height and width of every level");
  for (const int64_t size : sizes) TORCH_CHECK(size >= 0, op, ": sizes must not be negative");
  for (size_t i = 2; i < sizes.size(); i += 2) {
    TORCH_CHECK(
        sizes[i] < (int64_t(1) << 26) && sizes[i + 1] < (int64_t(1) << 26) &&
            sizes[i] * sizes[i + 1] < std::numeric_limits<int>::max() / 16,
        op, ": features are too large");
  }
  TORCH_CHECK(
      grad.size(0) == rois.size(0) && grad.size(1) == sizes[1], op,
      ": grad does not fit rois and sizes");
}

inline void check_ps(
    const char* op, const char* name, const at::Tensor& input, const at::Tensor& rois,
    double scale, int64_t group_size, int64_t out_size, int64_t sides) {
  check_floating(op, name, input, 4);
  check_coordinates(op, "rois", rois, 5, input);
  check_scale(op, scale);
  TORCH_CHECK(
      1 <= group_size && group_size <= out_size && out_size <= kMaxPsSize, op,
      ": 1 <= group_size <= out_size <= ", kMaxPsSize, " must hold");
  const int64_t parts = sides * group_size * group_size;
  TORCH_CHECK(
      input.size(1) % parts == 0, op, ": the channels of ", name, " must be a multiple of ",
      parts);
  TORCH_CHECK(
      input.size(2) * input.size(3) < std::numeric_limits<int>::max() / 16, op, ": ", name,
      " is too large");
}

inline void check_ps_gradient(
    const char* op, const at::Tensor& grad, const at::Tensor& rois, double scale,
    int64_t group_size, int64_t out_size, at::IntArrayRef input_size) {
  TORCH_CHECK(
      input_size.size() == 4 && (grad.dim() == 2 || grad.size(2) == grad.size(3)), op,
      ": grad must be (N, D, P, P) and input_size have 4 numbers");
  check_coordinates(op, "rois", rois, 5, grad);
  check_scale(op, scale);
  TORCH_CHECK(
      1 <= group_size && group_size <= out_size && out_size <= kMaxPsSize, op,
      ": 1 <= group_size <= out_size <= ", kMaxPsSize, " must hold");
  for (const int64_t size : input_size) TORCH_CHECK(size >= 0, op, ": input_size must not be negative");
  TORCH_CHECK(
      grad.size(0) == rois.size(0) && grad.size(1) * group_size * group_size == input_size[1], op,
      ": grad does not fit rois and input_size");
  TORCH_CHECK(
      input_size[2] < (int64_t(1) << 26) && input_size[3] < (int64_t(1) << 26) &&
          input_size[2] * input_size[3] < std::numeric_limits<int>::max() / 16,
      op, ": input_size is too large");
}

inline void check_pick(const char* op, const at::Tensor& pick, const at::Tensor& score, int64_t count) {
  TORCH_CHECK(
      pick.scalar_type() == at::kLong && pick.dim() == 1 && pick.size(0) == count &&
          pick.device() == score.device(),
      op, ": pick must be int64 of shape (N,) on the device of score");
}

inline void check_head_gradient(
    const char* op, const std::optional<at::Tensor>& grad_cls,
    const std::optional<at::Tensor>& grad_seg, const at::Tensor& score, int64_t count,
    int64_t classes, int64_t out_size) {
  const auto fits = [&](const at::Tensor& grad) {
    return grad.scalar_type() == score.scalar_type() && grad.device() == score.device();
  };
  TORCH_CHECK(
      !grad_cls ||
          (grad_cls->dim() == 2 && grad_cls->size(0) == count && grad_cls->size(1) == classes &&
           fits(*grad_cls)),
      op, ": grad_cls must have the shape of cls_score");
  TORCH_CHECK(
      !grad_seg ||
          (grad_seg->dim() == 4 && grad_seg->size(0) == count && grad_seg->size(1) == 2 &&
           grad_seg->size(2) == out_size && grad_seg->size(3) == out_size && fits(*grad_seg)),
      op, ": grad_seg must have the shape of seg_logit");
}

inline void check_resize(const char* op, const at::Tensor& masks, int64_t out_h, int64_t out_w) {
  check_floating(op, "masks", masks, 4);
  const int64_t limit = int64_t(1) << 24;  // positions are exact in float32
  TORCH_CHECK(
      masks.size(2) >= 1 && masks.size(3) >= 1 && out_h >= 1 && out_w >= 1, op,
      ": mask and output sizes must be at least 1");
  TORCH_CHECK(
      masks.size(2) < limit && masks.size(3) < limit && out_h < limit && out_w < limit, op,
      ": sizes are too large");
}

inline void check_gate(const char* op, const at::Tensor& features, const at::Tensor& masks) {
  check_floating(op, "features", features, 4);
  check_resize(op, masks, 1, 1);
  TORCH_CHECK(
      masks.size(0) == features.size(0) && masks.size(1) == 1 &&
          masks.scalar_type() == features.scalar_type() && masks.device() == features.device(),
      op, ": masks must be (N, 1, M, M) with N, dtype and device of features");
}

inline void check_paste(
    const char* op, const at::Tensor& masks, const at::Tensor& boxes, int64_t img_h,
    int64_t img_w) {
  check_floating(op, "masks", masks, 3);
  TORCH_CHECK(
      masks.size(1) == masks.size(2) && masks.size(1) >= 1 && masks.size(1) <= kMaxMaskSize, op,
      ": masks must be (N, M, M) with M in 1..", kMaxMaskSize);
  check_coordinates(op, "boxes", boxes, 4, masks);
  TORCH_CHECK(boxes.size(0) == masks.size(0), op, ": as many boxes as masks are needed");
  TORCH_CHECK(img_h >= 1 && img_w >= 1, op, ": image sizes must be at least 1");
  TORCH_CHECK(
      img_h < (int64_t(1) << 24) && img_w < (int64_t(1) << 24), op, ": image is too large");
}

inline VoteMode check_vote(
    const char* op, const at::Tensor& masks, const at::Tensor& boxes, const at::Tensor& index,
    const at::Tensor& offset, const at::Tensor& weight, int64_t img_h, int64_t img_w,
    c10::string_view mode) {
  check_paste(op, masks, boxes, img_h, img_w);
  TORCH_CHECK(
      mode == "fcis" || mode == "mnc" || mode == "crop", op,
      ": mode must be one of fcis, mnc, crop");
  TORCH_CHECK(
      index.dim() == 1 && index.scalar_type() == at::kInt, op,
      ": cand_index must be one-dimensional int32");
  TORCH_CHECK(
      offset.dim() == 1 && offset.scalar_type() == at::kInt && offset.size(0) >= 1, op,
      ": cand_offset must be one-dimensional int32 with R + 1 entries");
  TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == index.size(0) && weight.scalar_type() == at::kFloat,
      op, ": cand_weight must be float32 with an entry per candidate");
  TORCH_CHECK(
      index.device() == masks.device() && offset.device() == masks.device() &&
          weight.device() == masks.device(),
      op, ": all tensors must be on one device");
  if (mode == "fcis") return VoteMode::kFcis;
  return mode == "mnc" ? VoteMode::kMnc : VoteMode::kCrop;
}

}  // namespace d2ext
