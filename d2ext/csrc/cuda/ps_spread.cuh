// Gradients of bins into the cells that they are means of, for the position-sensitive operators.
//
// A warp owns a tile of a part's planes, holds it in shared memory and walks the RoIs in order: no
// other warp adds to it, so that there are no atomics and the sums have one order. Of 32 RoIs at a
// time, those whose bins of the part meet the tile are taken; for each of them the lanes first hold
// a bin each and then a cell each.
#pragma once

#include "ps_bins.cuh"

namespace d2ext {

constexpr int kSpreadWarps = kThreads / 32;
constexpr int kTileBytes = 40 * 1024;  // of a block; with what is staged, granted without asking
constexpr int kEnoughBlocks = 200;     // more than a GPU's multiprocessors
constexpr int kLeastRows = 8;          // of a tile that is cut for more blocks

struct PsTile {
  int height, width;  // cells of a tile, less at the end of a map
  int rows, columns;  // tiles of a map
  int warps;          // of a block, a part column each
};

// `sides`: planes of a tile, `item`: bytes of a cell, `blocks`: in x for every row of tiles.
inline PsTile tile_of(const PsShape& shape, int sides, int item, int64_t blocks) {
  const auto parts = [](int whole, int part) { return (whole + part - 1) / part; };
  const int cells = kTileBytes / kSpreadWarps / (sides * item);
  PsTile tile;
  tile.warps = std::min(shape.group, kSpreadWarps);
  tile.columns = parts(shape.width, cells);
  tile.width = parts(shape.width, tile.columns);
  const int fitting = parts(shape.height, cells / tile.width);
  const int64_t wanted = (kEnoughBlocks + blocks * tile.columns - 1) / (blocks * tile.columns);
  const int most = std::max(fitting, parts(shape.height, kLeastRows));
  tile.rows = static_cast<int>(std::min<int64_t>(std::max<int64_t>(fitting, wanted), most));
  tile.height = parts(shape.height, tile.rows);
  tile.rows = parts(shape.height, tile.height);
  return tile;
}

// Which of `count` bins along one axis hold a cell: their ranges begin and end in ascending order.
__device__ __forceinline__ CellRange bins_of(int cell, const int2* ranges, int count) {
  CellRange bins = {0, 0};
  for (int k = 0; k < count; ++k) {
    const int2 range = ranges[k];
    bins.first += range.y <= cell;
    bins.last += range.x <= cell;
  }
  return bins;
}

// Grid (part rows x tiles, maps / sides, images); shared memory: `kSides` planes of a tile per warp.
// `values.load` gives the gradients of bin (i, j) of a RoI, one per side: neighbouring maps, of which
// a part's planes lie `parts` apart. `P` is what cells are summed in.
template <class T, class P, class Values>
__global__ void __launch_bounds__(kThreads, 1) spread(
    PsBins<Accumulate<T>> table, PsShape shape, PsTile tile, Values values, T* grad) {
  using A = Accumulate<T>;
  constexpr int kSides = Values::kSides;
  constexpr unsigned kAll = 0xffffffffu;
  static_assert(kTileBytes + kThreads * (2 * sizeof(int2) + kSides * sizeof(A)) <= 48 * 1024);
  extern __shared__ double shared[];
  __shared__ int2 staged_rows[kThreads], staged_columns[kThreads];
  __shared__ A staged_values[kSides][kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, staged = warp * 32;
  const int part_y = blockIdx.x % shape.group, image = blockIdx.z;
  const int number = blockIdx.x / shape.group;
  const int top = number / tile.columns * tile.height, left = number % tile.columns * tile.width;
  const int height = min(tile.height, shape.height - top);
  const int width = min(tile.width, shape.width - left);
  const int first_i = shape.part_first(part_y), last_i = shape.part_first(part_y + 1);
  P* planes = reinterpret_cast<P*>(shared) + warp * kSides * tile.height * tile.width;
  for (int64_t map = blockIdx.y; map * kSides < shape.maps; map += gridDim.y) {
    for (int part_x = warp; part_x < shape.group; part_x += tile.warps) {
      const int part = part_y * shape.group + part_x;
      const int first_j = shape.part_first(part_x), last_j = shape.part_first(part_x + 1);
      for (int cell = lane; cell < kSides * height * width; cell += 32) planes[cell] = P(0);
      // at most 32 bins at a time: whole rows of them if one fits
      const int row_bins = min(last_j - first_j, 32), rows = 32 / row_bins;
      const int row_chunks = (last_j - first_j + row_bins - 1) / row_bins;
      const int chunks = (last_i - first_i + rows - 1) / rows * row_chunks;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int i0 = first_i + chunk / row_chunks * rows, i1 = min(i0 + rows, last_i);
        const int j0 = first_j + chunk % row_chunks * row_bins, j1 = min(j0 + row_bins, last_j);
        const int i = i0 + lane / (j1 - j0), j = j0 + lane % (j1 - j0);
        const int bin = (i - first_i) * (last_j - first_j) + j - first_j;
        for (int64_t n0 = 0; n0 < shape.count; n0 += 32) {
          CellRange y = {0, 0}, x = {0, 0};  // cells of the bins within the tile
          if (n0 + lane < shape.count && table.images[n0 + lane] == image) {
            y.first = max(table.row(shape, i0, n0 + lane).first, top);
            y.last = min(table.row(shape, i1 - 1, n0 + lane).last, top + height);
            x.first = max(table.column(shape, j0, n0 + lane).first, left);
            x.last = min(table.column(shape, j1 - 1, n0 + lane).last, left + width);
          }
          unsigned hits = __ballot_sync(kAll, y.first < y.last && x.first < x.last);
          while (hits != 0) {
            const int source = __ffs(hits) - 1;
            const int64_t n = n0 + source;
            hits &= hits - 1;
            const int y0 = __shfl_sync(kAll, y.first, source);
            const int y1 = __shfl_sync(kAll, y.last, source);
            const int x0 = __shfl_sync(kAll, x.first, source);
            const int x1 = __shfl_sync(kAll, x.last, source);
            bool some = false;
            if (i < i1) {
              const CellRange row = table.row(shape, i, n), column = table.column(shape, j, n);
              if (j == j0) staged_rows[staged + i - i0] = make_int2(row.first, row.last);
              if (i == i0) staged_columns[staged + j - j0] = make_int2(column.first, column.last);
              A value[kSides] = {};
              values.load(shape, n, map, part, bin, i, j, value);
              const A share = table.share(row, column);
              for (int side = 0; side < kSides; ++side) {
                staged_values[side][staged + lane] = value[side] * share;
                some = some || value[side] != A(0);
              }
            }
            some = __any_sync(kAll, some);
            __syncwarp();
            for (int cell_x = x0 + lane % 8; some && cell_x < x1; cell_x += 8) {
              const CellRange js = bins_of(cell_x, staged_columns + staged, j1 - j0);
              for (int cell_y = y0 + lane / 8; cell_y < y1; cell_y += 4) {
                const CellRange is = bins_of(cell_y, staged_rows + staged, i1 - i0);
                A sum[kSides] = {};
                for (int k = is.first; k < is.last; ++k) {
                  for (int l = js.first; l < js.last; ++l) {
                    for (int side = 0; side < kSides; ++side) {
                      sum[side] += staged_values[side][staged + k * (j1 - j0) + l];
                    }
                  }
                }
                P* to = planes + (cell_y - top) * width + cell_x - left;
                for (int side = 0; side < kSides; ++side) to[side * height * width] += sum[side];
              }
            }
            __syncwarp();  // what is staged has been read, and the cells are the next RoI's
          }
        }
      }
      __syncwarp();
      for (int side = 0; side < kSides; ++side) {
        T* plane = grad +
            ((image * shape.maps + map * kSides + side) * shape.parts() + part) * shape.cells();
        for (int y = 0; y < height; ++y) {
          const P* from = planes + (side * height + y) * width;
          T* to = plane + int64_t(top + y) * shape.width + left;
          for (int x = lane; x < width; x += 32) to[x] = static_cast<T>(from[x]);
        }
      }
      __syncwarp();  // the planes are the next part's
    }
  }
}

template <class T, class P, class Values>
void launch_spread(const PsTable& table, const PsShape& shape, const Values& values, T* grad) {
  const int64_t maps = std::min<int64_t>(shape.maps / Values::kSides, 65535);
  const PsTile tile =
      tile_of(shape, Values::kSides, sizeof(P), maps * shape.batch * shape.group);
  const dim3 grid(
      static_cast<unsigned>(shape.group * tile.rows * tile.columns), static_cast<unsigned>(maps),
      static_cast<unsigned>(shape.batch));
  const size_t bytes = sizeof(P) * Values::kSides * tile.warps * tile.height * tile.width;
  const auto kernel = spread<T, P, Values>;
  kernel<<<grid, 32 * tile.warps, bytes, c10::cuda::getCurrentCUDAStream()>>>(
      table.bins<Accumulate<T>>(), shape, tile, values, grad);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Fills all of `grad`, (images, maps x parts, height, width). On a small map very many bins meet in
// one cell: where a part's planes fit into shared memory in double, they are summed so.
template <class T, class Values>
void run_spread(const PsTable& table, const PsShape& shape, const Values& values, T* grad) {
  const size_t doubles = shape.cells() * Values::kSides * sizeof(double);
  if (doubles <= kTileBytes / kSpreadWarps) {
    launch_spread<T, double>(table, shape, values, grad);
  } else {
    launch_spread<T, Accumulate<T>>(table, shape, values, grad);
  }
}

}  // namespace d2ext
