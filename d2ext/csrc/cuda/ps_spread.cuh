// Gradients of bins into the cells that they are means of, for the position-sensitive operators.
//
// A warp owns a tile of a part's planes, holds it in shared memory and walks the RoIs in order: no
// other warp adds to it, so that there are no atomics and the sums have one order. Of 32 RoIs at a
// time, those whose bins of the part meet the tile are taken: rows are looked at first, as few RoIs
// have bins in a tile's rows, and what else is read of the table lies together for a RoI. For each
// RoI the lanes first hold a bin each and then a cell each, of the maps that share its bins.
#pragma once

#include "ps_bins.cuh"

namespace d2ext {

constexpr int kSpreadWarps = kThreads / 32;
constexpr int kEnoughBlocks = 200;  // more than a GPU's multiprocessors
constexpr int kLeastRows = 8;       // of a tile that is cut for more blocks, all its sides together
constexpr int kSmallMap = 640;      // cells: where very many bins meet in one

// Shared memory for the tiles of a block: with what is staged, 48 KiB are granted without asking.
template <class A, int kSides>
constexpr int kTileBytes = 48 * 1024 - kThreads * (2 * sizeof(unsigned) + kSides * sizeof(A));

struct PsTile {
  int height, width;  // cells of a tile, less at the end of a map
  int rows, columns;  // tiles of a map
  int sides;          // planes of a tile, less for the last maps
  int warps;          // of a block, a part column each
};

// `sides`: planes of a tile, `bytes`: for all its tiles, `item`: of a cell, `blocks`: in x for every
// row of tiles.
inline PsTile tile_of(const PsShape& shape, int sides, int bytes, int item, int64_t blocks) {
  const auto parts = [](int whole, int part) { return (whole + part - 1) / part; };
  const int cells = bytes / kSpreadWarps / (sides * item);
  PsTile tile;
  tile.sides = sides;
  tile.warps = std::min(shape.group, kSpreadWarps);
  tile.columns = parts(shape.width, cells);
  tile.width = parts(shape.width, tile.columns);
  const int fitting = parts(shape.height, cells / tile.width);
  const int64_t wanted = (kEnoughBlocks + blocks * tile.columns - 1) / (blocks * tile.columns);
  const int most = std::max(fitting, parts(shape.height, kLeastRows / sides));
  tile.rows = static_cast<int>(std::min<int64_t>(std::max<int64_t>(fitting, wanted), most));
  tile.height = parts(shape.height, tile.rows);
  tile.rows = parts(shape.height, tile.height);
  return tile;
}

// Which of `count` bins along one axis hold a cell: their ranges begin and end in ascending order.
__device__ __forceinline__ CellRange bins_of(int cell, const unsigned* ranges, int count) {
  CellRange bins = {0, 0};
  for (int k = 0; k < count; ++k) {
    const CellRange range = PsBins<float>::unpack(ranges[k]);
    bins.first += range.last <= cell;
    bins.last += range.first <= cell;
  }
  return bins;
}

// Grid (part rows x tiles, maps / kSides, images); shared memory: `kSides` planes of a tile per warp.
// `values.load` gives the gradients of bin (i, j) of a RoI, one per side: neighbouring maps, of which
// a part's planes lie `parts` apart. The last sides may have no map. `P` is what cells are summed
// in.
template <class T, class P, class Values>
__global__ void __launch_bounds__(kThreads, 1) spread(
    PsBins<Accumulate<T>> table, PsShape shape, PsTile tile, Values values, T* grad) {
  using A = Accumulate<T>;
  constexpr int kSides = Values::kSides;
  constexpr unsigned kAll = 0xffffffffu;
  extern __shared__ double shared[];
  __shared__ unsigned staged_rows[kThreads], staged_columns[kThreads];
  __shared__ A staged_values[kSides][kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, staged = warp * 32;
  const int part_y = blockIdx.x % shape.group, image = blockIdx.z;
  const int number = blockIdx.x / shape.group;
  const int top = number / tile.columns * tile.height, left = number % tile.columns * tile.width;
  const int height = min(tile.height, shape.height - top);
  const int width = min(tile.width, shape.width - left);
  const int first_i = shape.part_first(part_y), last_i = shape.part_first(part_y + 1);
  P* planes = reinterpret_cast<P*>(shared) + warp * tile.sides * tile.height * tile.width;
  for (int64_t map = int64_t(blockIdx.y) * kSides; map < shape.maps;
       map += int64_t(gridDim.y) * kSides) {
    const int sides = static_cast<int>(min(int64_t(kSides), shape.maps - map));
    for (int part_x = warp; part_x < shape.group; part_x += tile.warps) {
      const int part = part_y * shape.group + part_x;
      const int first_j = shape.part_first(part_x), last_j = shape.part_first(part_x + 1);
      for (int cell = lane; cell < sides * height * width; cell += 32) planes[cell] = P(0);
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
          if (n0 + lane < shape.count) {
            y.first = max(table.row(shape, i0, n0 + lane).first, top);
            y.last = min(table.row(shape, i1 - 1, n0 + lane).last, top + height);
          }
          // rows that take no part have empty ranges
          if (y.first < y.last && (shape.batch == 1 || table.images[n0 + lane] == image)) {
            const unsigned* columns = table.columns_of(shape, n0 + lane);
            x.first = max(table.unpack(columns[j0]).first, left);
            x.last = min(table.unpack(columns[j1 - 1]).last, left + width);
          }
          unsigned hits = __ballot_sync(kAll, x.first < x.last);
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
              const unsigned packed_row = table.rows_of(shape, n)[i];
              const unsigned packed_column = table.columns_of(shape, n)[j];
              if (j == j0) staged_rows[staged + i - i0] = packed_row;
              if (i == i0) staged_columns[staged + j - j0] = packed_column;
              const CellRange row = table.unpack(packed_row);
              const CellRange column = table.unpack(packed_column);
              A value[kSides] = {};
              const bool met = row.first < y1 && row.last > y0 && column.first < x1 &&
                  column.last > x0;
              if (met) values.load(shape, n, map, part, bin, i, j, value);
              const A share = met ? table.share(row, column) : A(0);
#pragma unroll
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
#pragma unroll
                    for (int side = 0; side < kSides; ++side) {
                      sum[side] += staged_values[side][staged + k * (j1 - j0) + l];
                    }
                  }
                }
                P* to = planes + (cell_y - top) * width + cell_x - left;
#pragma unroll
                for (int side = 0; side < kSides; ++side) {
                  if (side < sides) to[side * height * width] += sum[side];
                }
              }
            }
            __syncwarp();  // what is staged has been read, and the cells are the next RoI's
          }
        }
      }
      __syncwarp();
      for (int side = 0; side < sides; ++side) {
        T* plane = grad +
            ((image * shape.maps + map + side) * shape.parts() + part) * shape.cells();
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
  using A = Accumulate<T>;
  constexpr int kSides = Values::kSides, kBytes = kTileBytes<A, kSides>;
  const int64_t maps = std::min<int64_t>((shape.maps + kSides - 1) / kSides, 65535);
  const int sides = static_cast<int>(std::min<int64_t>(kSides, shape.maps));
  const PsTile tile =
      tile_of(shape, sides, kBytes, sizeof(P), maps * shape.batch * shape.group);
  const dim3 grid(
      static_cast<unsigned>(shape.group * tile.rows * tile.columns), static_cast<unsigned>(maps),
      static_cast<unsigned>(shape.batch));
  const size_t bytes = sizeof(P) * sides * tile.warps * tile.height * tile.width;
  const auto kernel = spread<T, P, Values>;
  kernel<<<grid, 32 * tile.warps, bytes, c10::cuda::getCurrentCUDAStream()>>>(
      table.bins<A>(), shape, tile, values, grad);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Fills all of `grad`, (images, maps x parts, height, width). The cells of a small map are summed in
// double, as very many bins meet in each.
template <class T, class Values>
void run_spread(const PsTable& table, const PsShape& shape, const Values& values, T* grad) {
  if (shape.cells() <= kSmallMap) {
    launch_spread<T, double>(table, shape, values, grad);
  } else {
    launch_spread<T, Accumulate<T>>(table, shape, values, grad);
  }
}

}  // namespace d2ext
