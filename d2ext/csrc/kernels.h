// Every kernel of the extension, by device. Signatures follow the schemas in d2ext/ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#define D2EXT_DECLARE(DEVICE)                                                                      \
  at::Tensor roi_warp_##DEVICE(                                                                    \
      const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t out_h,        \
      int64_t out_w, bool aligned, bool legacy, c10::string_view border,                           \
      c10::string_view bin_reduce);                                                                \
  std::tuple<at::Tensor, at::Tensor> roi_warp_backward_##DEVICE(                                   \
      const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,                     \
      double spatial_scale, int64_t out_h, int64_t out_w, bool aligned, bool legacy,               \
      c10::string_view border, c10::string_view bin_reduce, bool need_input, bool need_rois);      \
  at::Tensor roi_warp_max_pool_##DEVICE(                                                           \
      const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t out_h,        \
      int64_t out_w, bool aligned, bool legacy, c10::string_view border);                          \
  std::tuple<at::Tensor, at::Tensor> roi_warp_max_pool_backward_##DEVICE(                          \
      const at::Tensor& grad, const at::Tensor& input, const at::Tensor& rois,                     \
      double spatial_scale, int64_t out_h, int64_t out_w, bool aligned, bool legacy,               \
      c10::string_view border, bool need_input, bool need_rois);                                   \
  at::Tensor ps_roi_assemble_##DEVICE(                                                             \
      const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t group_size,   \
      int64_t out_size, bool copy, bool legacy);                                                   \
  at::Tensor ps_roi_assemble_backward_##DEVICE(                                                    \
      const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,    \
      at::IntArrayRef input_size, bool copy, bool legacy);                                         \
  at::Tensor ps_roi_mean_##DEVICE(                                                                 \
      const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t group_size,   \
      int64_t out_size, bool copy, bool legacy);                                                   \
  at::Tensor ps_roi_mean_backward_##DEVICE(                                                        \
      const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group_size,    \
      int64_t out_size, at::IntArrayRef input_size, bool copy, bool legacy);                       \
  std::tuple<at::Tensor, at::Tensor, at::Tensor> fcis_joint_head_##DEVICE(                         \
      const at::Tensor& score, const at::Tensor& rois, double spatial_scale, int64_t group_size,   \
      int64_t out_size, const std::optional<at::Tensor>& pick, bool copy, bool legacy);            \
  at::Tensor fcis_joint_head_backward_##DEVICE(                                                    \
      const std::optional<at::Tensor>& grad_cls, const std::optional<at::Tensor>& grad_seg,        \
      const at::Tensor& score, const at::Tensor& rois, const at::Tensor& picked,                   \
      double spatial_scale, int64_t group_size, int64_t out_size, bool copy, bool legacy);         \
  at::Tensor mask_resize_##DEVICE(const at::Tensor& masks, int64_t out_h, int64_t out_w);          \
  at::Tensor mask_resize_backward_##DEVICE(                                                        \
      const at::Tensor& grad, int64_t mask_h, int64_t mask_w);                                     \
  at::Tensor mask_gate_##DEVICE(const at::Tensor& features, const at::Tensor& masks);              \
  std::tuple<at::Tensor, at::Tensor> mask_gate_backward_##DEVICE(                                  \
      const at::Tensor& grad, const at::Tensor& features, const at::Tensor& masks);                \
  at::Tensor paste_masks_##DEVICE(                                                                 \
      const at::Tensor& masks, const at::Tensor& boxes, int64_t img_h, int64_t img_w,              \
      double threshold);                                                                           \
  std::tuple<at::Tensor, at::Tensor> mask_vote_##DEVICE(                                           \
      const at::Tensor& masks, const at::Tensor& boxes, const at::Tensor& cand_index,              \
      const at::Tensor& cand_offset, const at::Tensor& cand_weight, int64_t img_h, int64_t img_w,  \
      double binary_thresh, c10::string_view mode);

#define D2EXT_REGISTER(LIBRARY, DEVICE)                                                      \
  LIBRARY.impl("roi_warp", &d2ext::roi_warp_##DEVICE);                                       \
  LIBRARY.impl("roi_warp_backward", &d2ext::roi_warp_backward_##DEVICE);                     \
  LIBRARY.impl("roi_warp_max_pool", &d2ext::roi_warp_max_pool_##DEVICE);                     \
  LIBRARY.impl("roi_warp_max_pool_backward", &d2ext::roi_warp_max_pool_backward_##DEVICE);   \
  LIBRARY.impl("ps_roi_assemble", &d2ext::ps_roi_assemble_##DEVICE);                         \
  LIBRARY.impl("ps_roi_assemble_backward", &d2ext::ps_roi_assemble_backward_##DEVICE);       \
  LIBRARY.impl("ps_roi_mean", &d2ext::ps_roi_mean_##DEVICE);                                 \
  LIBRARY.impl("ps_roi_mean_backward", &d2ext::ps_roi_mean_backward_##DEVICE);               \
  LIBRARY.impl("fcis_joint_head", &d2ext::fcis_joint_head_##DEVICE);                         \
  LIBRARY.impl("fcis_joint_head_backward", &d2ext::fcis_joint_head_backward_##DEVICE);       \
  LIBRARY.impl("mask_resize", &d2ext::mask_resize_##DEVICE);                                 \
  LIBRARY.impl("mask_resize_backward", &d2ext::mask_resize_backward_##DEVICE);               \
  LIBRARY.impl("mask_gate", &d2ext::mask_gate_##DEVICE);                                     \
  LIBRARY.impl("mask_gate_backward", &d2ext::mask_gate_backward_##DEVICE);                   \
  LIBRARY.impl("paste_masks", &d2ext::paste_masks_##DEVICE);                                 \
  LIBRARY.impl("mask_vote", &d2ext::mask_vote_##DEVICE);

namespace d2ext {
D2EXT_DECLARE(cpu)
#ifdef D2EXT_WITH_CUDA
D2EXT_DECLARE(cuda)
#endif
}  // namespace d2ext
