// Pasting masks into images on CUDA. A block writes a piece of one image with wide stores; where the
// box of the mask meets it, the piece is put together in shared memory first.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.cuh"

namespace d2ext {
namespace {

constexpr int kPiece = 16384;  // bytes that a block writes, at most
constexpr int kRows = 32;      // rows of an image in them, at most; parts of two more
constexpr int kWord = 16;      // bytes written by one store
constexpr int kSplits = 4;     // warps that share the rows of 32 columns

// Where a row or column of an image lies in a mask: cells and their weights, none outside.
template <class A>
struct Line {
  A low_in, high_in;
  int low, high;  // low < 0: outside
};

template <class A>
__device__ __forceinline__ Line<A> paste_line(int pixel, A low, A high, int size) {
  const A position = paste_position(pixel, low, high, size);
  if (!(position > A(-1) && position < A(size))) return {A(0), A(0), -1, -1};
  const A base = floor(position), part = position - base;
  const int cell = static_cast<int>(base);
  return {
      cell >= 0 ? A(1) - part : A(0), cell + 1 < size ? part : A(0), max(cell, 0),
      min(cell + 1, size - 1)};
}

// All pixels that may have a position inside of the mask, rounding included.
template <class A>
__device__ __forceinline__ CellRange paste_span(A low, A high, int size, int image) {
  const A margin = (high - low) / A(2 * size) + (fabs(low) + fabs(high)) * A(1e-5) + A(2);
  const A first = low - margin, last = high + margin;
  CellRange range;
  range.first = first > A(0) ? (first < A(image) ? static_cast<int>(first) : image) : 0;
  range.last = last > A(0) ? (last < A(image - 1) ? static_cast<int>(last) + 1 : image) : 0;
  if (range.last < range.first) range.last = range.first;
  return range;
}

template <class A>
struct PasteShape {
  int64_t count;
  int size, img_h, img_w, piece;
  A threshold;
  bool as_bytes;
};

// Byte of a pixel of an image that has a mask.
template <class A>
__device__ __forceinline__ uint32_t pixel_byte(const PasteShape<A>& shape, A value) {
  if (!shape.as_bytes) return value >= shape.threshold;
  return value > A(0) ? static_cast<uint32_t>(min(value * A(255), A(255))) : 0;
}

// blockIdx.x takes a piece, blockIdx.y masks.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) paste(
    const T* __restrict__ masks, const Accumulate<T>* __restrict__ boxes,
    PasteShape<Accumulate<T>> shape, uint8_t* output) {
  using A = Accumulate<T>;
  __shared__ uint4 staged[kPiece / kWord];
  __shared__ Line<A> rows[kRows + 2];
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(staged);
  const int area = shape.img_h * shape.img_w, size = shape.size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t n = blockIdx.y; n < shape.count; n += gridDim.y) {
    uint8_t* const image = output + n * area;
    // pieces begin where wide stores may, the first one in front of the image
    const int64_t start =
        int64_t(blockIdx.x) * shape.piece - int64_t(reinterpret_cast<uintptr_t>(image) % kWord);
    const int first = static_cast<int>(max(start, int64_t(0)));
    const int last = static_cast<int>(min(start + shape.piece, int64_t(area)));
    if (first >= last) continue;
    const A* box = boxes + n * 4;
    const A x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
    const bool solid =
        finite(x1) && finite(y1) && finite(x2) && finite(y2) && x2 > x1 && y2 > y1;
    const uint32_t outside = solid ? pixel_byte(shape, A(0)) * 0x01010101u : 0;
    const uint4 empty = make_uint4(outside, outside, outside, outside);
    const int words = static_cast<int>((last - start + kWord - 1) / kWord);
    CellRange columns = {0, 0}, lines = {0, 0};
    if (solid) {
      columns = paste_span(x1, x2, size, shape.img_w);
      lines = paste_span(y1, y2, size, shape.img_h);
      lines.first = max(lines.first, first / shape.img_w);
      lines.last = min(lines.last, (last - 1) / shape.img_w + 1);
    }
    const bool drawn = lines.first < lines.last && columns.first < columns.last;
    if (drawn) {
      __syncthreads();  // the piece before is written
      for (int i = threadIdx.x; i < words; i += blockDim.x) staged[i] = empty;
      for (int i = threadIdx.x; i < lines.last - lines.first; i += blockDim.x) {
        rows[i] = paste_line(lines.first + i, y1, y2, size);
      }
      __syncthreads();
      const T* mask = masks + n * size * size;
      const int groups = (columns.last - columns.first + 31) / 32;
      for (int item = warp; item < groups * kSplits; item += warps) {
        const int x = columns.first + item / kSplits * 32 + lane;
        if (x >= columns.last) continue;
        const Line<A> u = paste_line(x, x1, x2, size);
        if (u.low < 0) continue;
        for (int i = item % kSplits; i < lines.last - lines.first; i += kSplits) {
          const int at = (lines.first + i) * shape.img_w + x;
          const Line<A> v = rows[i];
          if (at < first || at >= last || v.low < 0) continue;
          const T* top = mask + v.low * size;
          const T* low = mask + v.high * size;
          const A value = v.low_in *
                  (u.low_in * static_cast<A>(top[u.low]) +
                   u.high_in * static_cast<A>(top[u.high])) +
              v.high_in *
                  (u.low_in * static_cast<A>(low[u.low]) +
                   u.high_in * static_cast<A>(low[u.high]));
          bytes[at - start] = static_cast<uint8_t>(pixel_byte(shape, value));
        }
      }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
      const int64_t at = start + int64_t(i) * kWord;
      const uint4 word = drawn ? staged[i] : empty;
      if (at >= first && at + kWord <= last) {
        *reinterpret_cast<uint4*>(image + at) = word;
        continue;
      }
      const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int j = 0; j < kWord; ++j) {
        if (at + j >= first && at + j < last) {
          image[at + j] = static_cast<uint8_t>(parts[j / 4] >> (8 * (j % 4)));
        }
      }
    }
  }
}

}  // namespace

at::Tensor paste_masks_cuda(
    const at::Tensor& masks, const at::Tensor& boxes, int64_t img_h, int64_t img_w,
    double threshold) {
  check_paste("paste_masks", masks, boxes, img_h, img_w);
  TORCH_CHECK(img_h * img_w < (int64_t(1) << 31) - kWord, "paste_masks: image is too large");
  const c10::cuda::CUDAGuard guard(masks.device());
  const at::Tensor data = masks.contiguous();
  const at::Tensor corners = boxes.to(accumulate_type(masks)).contiguous();
  at::Tensor output = at::empty(
      {masks.size(0), img_h, img_w}, masks.options().dtype(threshold < 0 ? at::kByte : at::kBool));
  if (output.numel() == 0) return output;
  const int64_t piece = std::min<int64_t>(kPiece, kRows * img_w / kWord * kWord);
  const dim3 grid(
      static_cast<unsigned>(blocks_for(img_h * img_w + kWord - 1, piece)),
      static_cast<unsigned>(std::min<int64_t>(masks.size(0), 65535)));
  dispatch(masks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const PasteShape<A> shape{
        masks.size(0), static_cast<int>(masks.size(1)), static_cast<int>(img_h),
        static_cast<int>(img_w), static_cast<int>(piece), static_cast<A>(threshold),
        threshold < 0};
    paste<T><<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        data.const_data_ptr<T>(), corners.const_data_ptr<A>(), shape,
        static_cast<uint8_t*>(output.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  library.impl("paste_masks", &paste_masks_cuda);
}

}  // namespace d2ext
