// Sixteen channels at a time: vectors of 32 bytes, transposes between planes and [cell][16] tiles,
// scratch memory. Wider vectors would be split into scalars by compilers that target AVX2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__GNUC__)
#define D2EXT_INLINE inline __attribute__((always_inline))
#define D2EXT_LAMBDA __attribute__((always_inline))
#else
#define D2EXT_INLINE inline
#define D2EXT_LAMBDA
#endif

// One function, compiled for several instruction sets, chosen when the library is loaded.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && \
    defined(__linux__) && !defined(D2EXT_NO_CLONES)
#define D2EXT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define D2EXT_CLONES
#endif

#if defined(__GNUC__)
#define D2EXT_UNROLL _Pragma("GCC unroll 16")
#else
#define D2EXT_UNROLL
#endif

namespace d2ext {

constexpr int kLanes = 16;

#if defined(__GNUC__)
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(32)));
  typedef int32_t mask __attribute__((vector_size(32)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef int64_t mask __attribute__((vector_size(32)));
};
template <class T>
constexpr int kWidth = 32 / sizeof(T);
#else
template <class T>
struct VectorOf {
  typedef T type;
  typedef bool mask;
};
template <class T>
constexpr int kWidth = 1;
#endif

// Sixteen values. Every loop below has a constant length and ends up in registers.
template <class T>
struct Pack {
  static constexpr int kParts = kLanes / kWidth<T>;
  using Vector = typename VectorOf<T>::type;
  Vector v[kParts];

  static D2EXT_INLINE Pack load(const T* from) {
    Pack pack;
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(&pack.v[i], from + i * kWidth<T>, sizeof(Vector));
    return pack;
  }
  static D2EXT_INLINE Pack fill(T value) {
    Pack pack;
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) pack.v[i] = Vector{} + value;
    return pack;
  }
  D2EXT_INLINE void store(T* to) const {
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(to + i * kWidth<T>, &v[i], sizeof(Vector));
  }
  D2EXT_INLINE void add(const Pack& other) {
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) v[i] += other.v[i];
  }
  D2EXT_INLINE void add(const Pack& other, T weight) {
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) v[i] += other.v[i] * weight;
  }
  D2EXT_INLINE void add(const Pack& a, const Pack& b) {
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) v[i] += a.v[i] * b.v[i];
  }
  D2EXT_INLINE Pack times(T weight) const {
    Pack pack;
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) pack.v[i] = v[i] * weight;
    return pack;
  }
  D2EXT_INLINE T sum() const {
    T lanes[kLanes], total = T(0);
    store(lanes);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return total;
  }
  // Where `value` beats this pack, take it and note `number`.
  D2EXT_INLINE void challenge(const Pack& value, Pack& winner, T number) {
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const auto better = value.v[i] > v[i];
      v[i] = better ? value.v[i] : v[i];
      winner.v[i] = better ? Vector{} + number : winner.v[i];
    }
  }
  // This pack where `winner` holds `number`, else 0.
  D2EXT_INLINE Pack where(const Pack& winner, T number) const {
    Pack pack;
    D2EXT_UNROLL
    for (int i = 0; i < kParts; ++i) {
      pack.v[i] = winner.v[i] == Vector{} + number ? v[i] : Vector{};
    }
    return pack;
  }
};

#if defined(__GNUC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define D2EXT_SHUFFLE 1
#endif
#endif

#ifdef D2EXT_SHUFFLE
// Transpose 8 rows of 8 floats in registers; rows lie at from(i) and go to to(i).
template <class From, class To>
D2EXT_INLINE void transpose8(const From& from, const To& to) {
  typedef float V __attribute__((vector_size(32)));
  V r[8], s[8];
  D2EXT_UNROLL
  for (int i = 0; i < 8; ++i) std::memcpy(&r[i], from(i), sizeof(V));
  D2EXT_UNROLL
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  D2EXT_UNROLL
  for (int i = 0; i < 8; i += 4) {
    r[i] = __builtin_shufflevector(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 1] = __builtin_shufflevector(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    r[i + 2] = __builtin_shufflevector(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 3] = __builtin_shufflevector(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  D2EXT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const V low = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const V high = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    std::memcpy(to(i), &low, sizeof(V));
    std::memcpy(to(i + 4), &high, sizeof(V));
  }
}

// Calls step(i) for blocks of 8 that cover 0 .. count - 1; the last one may reach back.
template <class F>
D2EXT_INLINE void by_eights(int count, const F& step) {
  for (int i = 0; i + 8 <= count; i += 8) step(i);
  if (count % 8) step(count - 8);
}
#endif

// `lanes` planes, the i-th at planes[i], of `count` values each -> [count][16]; other lanes 0.
template <class T>
D2EXT_INLINE void planes_to_tile(const T* const* planes, int lanes, int count, T* tile) {
#ifdef D2EXT_SHUFFLE
  if constexpr (sizeof(T) == 4) {
    if (lanes == kLanes && count >= 8) {
      by_eights(count, [&](int i) D2EXT_LAMBDA {
        for (int half = 0; half < kLanes; half += 8) {
          transpose8(
              [&](int row) D2EXT_LAMBDA { return planes[half + row] + i; },
              [&](int row) D2EXT_LAMBDA { return tile + (i + row) * kLanes + half; });
        }
      });
      return;
    }
  }
#endif
  for (int i = 0; i < count; ++i) {
    T* to = tile + static_cast<int64_t>(i) * kLanes;
    for (int lane = 0; lane < lanes; ++lane) to[lane] = planes[lane][i];
    for (int lane = lanes; lane < kLanes; ++lane) to[lane] = T(0);
  }
}

// The way back; tile lanes beyond `lanes` are dropped.
template <class T>
D2EXT_INLINE void tile_to_planes(const T* tile, int lanes, int count, T* const* planes) {
#ifdef D2EXT_SHUFFLE
  if constexpr (sizeof(T) == 4) {
    if (lanes == kLanes && count >= 8) {
      by_eights(count, [&](int i) D2EXT_LAMBDA {
        for (int half = 0; half < kLanes; half += 8) {
          transpose8(
              [&](int row) D2EXT_LAMBDA { return tile + (i + row) * kLanes + half; },
              [&](int row) D2EXT_LAMBDA { return planes[half + row] + i; });
        }
      });
      return;
    }
  }
#endif
  for (int i = 0; i < count; ++i) {
    const T* from = tile + static_cast<int64_t>(i) * kLanes;
    for (int lane = 0; lane < lanes; ++lane) planes[lane][i] = from[lane];
  }
}

// A view of sixteen (or fewer) channels: lane i of cell c is base[i * lane + c * cell].
template <class T>
struct ChannelView {
  T* base;
  int64_t lane, cell;
};

template <class T>
D2EXT_INLINE void load_view(const ChannelView<const T>& view, int lanes, int count, T* tile) {
  if (view.cell == 1) {
    const T* planes[kLanes];
    for (int i = 0; i < kLanes; ++i) planes[i] = view.base + (i < lanes ? i : 0) * view.lane;
    planes_to_tile(planes, lanes, count, tile);
    return;
  }
  if (view.lane == 1 && lanes == kLanes) {
    for (int64_t i = 0; i < count; ++i) {
      Pack<T>::load(view.base + i * view.cell).store(tile + i * kLanes);
    }
    return;
  }
  for (int i = 0; i < count; ++i) {
    T* to = tile + static_cast<int64_t>(i) * kLanes;
    const T* from = view.base + i * view.cell;
    for (int lane = 0; lane < lanes; ++lane) to[lane] = from[lane * view.lane];
    for (int lane = lanes; lane < kLanes; ++lane) to[lane] = T(0);
  }
}

template <class T>
D2EXT_INLINE void store_view(const T* tile, int lanes, int count, const ChannelView<T>& view) {
  if (view.cell == 1) {
    T* planes[kLanes];
    for (int i = 0; i < kLanes; ++i) planes[i] = view.base + (i < lanes ? i : 0) * view.lane;
    tile_to_planes(tile, lanes, count, planes);
    return;
  }
  if (view.lane == 1 && lanes == kLanes) {
    for (int64_t i = 0; i < count; ++i) {
      Pack<T>::load(tile + i * kLanes).store(view.base + i * view.cell);
    }
    return;
  }
  for (int i = 0; i < count; ++i) {
    const T* from = tile + static_cast<int64_t>(i) * kLanes;
    T* to = view.base + i * view.cell;
    for (int lane = 0; lane < lanes; ++lane) to[lane * view.lane] = from[lane];
  }
}

// `channel` and those after it of row `index` of a tensor (M, C, cells).
template <class T, class Data>
ChannelView<T> channel_view(
    Data* data, bool channels_last, int64_t channels, int64_t cells, int64_t index,
    int64_t channel) {
  ChannelView<T> view;
  view.lane = channels_last ? 1 : cells;
  view.cell = channels_last ? channels : 1;
  view.base = data + index * channels * cells + channel * view.lane;
  return view;
}

// Scratch memory of one task, aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count)
      : data_(static_cast<T*>(::operator new(std::max<size_t>(count, 1) * sizeof(T), kAlign))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    ::operator delete(data_, kAlign);
  }
  T* get() const {
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

}  // namespace d2ext
