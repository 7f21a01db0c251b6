// A bfloat16 matrix quantised along its rows, to E4M3 with a scale a row, and along its columns, to packed codes: one
// read. A cluster of thread blocks has 32 rows and keeps their codes until the largest scale of each row is known.

#pragma once

#include "parts.cuh"

namespace quartet {

struct BothAxes {
    const __nv_bfloat16* x;   // [rows, cols], rows ``stride`` elements apart, a multiple of 8 as cols is
    Chain along_rows, along_columns;
    uint8_t* values;          // [rows, padded cols], padded to multiples of 32
    float* row_scales;        // [rows]
    uint8_t *codes, *scales;  // [cols, padded rows / 2] and [cols, padded rows / 32]
    unsigned long long* inexact;
    int64_t stride;
    int rows, cols, width;    // columns of a thread block, a multiple of 64; those of the cluster cover a row
};

struct BothAxesShared {
    Rotation along_rows, along_columns;
    ScaleTable scales;
    FoldTable folds;
    unsigned tops[TILE_ROWS];
    int bytes[TILE_ROWS];
};

// Start to copy the tile at a row and a column of the matrix, zeros where it goes beyond.
__device__ inline void copy_tile(const BothAxes& p, unsigned tile, int row, int column) {
    const int r = lane_id() / 8, chunk = lane_id() % 8, c = column + 8 * chunk;
    const auto* from = p.x + (row + r) * p.stride + c;
    const unsigned to[2] = {tile + swizzled(r, chunk), tile + swizzled(r + 4, chunk)};
    if (row + TILE_ROWS <= p.rows && column + TILE_COLUMNS <= p.cols) {
#pragma unroll
        for (int i = 0; i < 8; ++i, from += 4 * p.stride) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                         :: "r"(to[i % 2] + i / 2 * 1024), "l"(from) : "memory");
        }
    } else {
        for (int i = 0; i < 8; ++i, from += 4 * p.stride) {
            const bool inside = row + r + 4 * i < p.rows && c < p.cols;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(to[i % 2] + i / 2 * 1024), "l"(inside ? from : p.x), "r"(inside ? 16 : 0) : "memory");
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ inline void quantize_both_axes(const BothAxes& p, int cluster) {
    extern __shared__ __align__(128) uint8_t memory[];
    auto& shared = *reinterpret_cast<BothAxesShared*>(memory);
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    const int place = Quantized::place(), rank = blockIdx.x % cluster;
    const int row = blockIdx.x / cluster * TILE_ROWS, first_column = rank * p.width;
    const int64_t row_groups = (p.cols + 31) / 32 * 2, column_groups = (p.rows + 31) / 32 * 2;
    uint8_t* const tiles = memory + sizeof(BothAxesShared);
    Part part(tiles + warps * 2 * TILE_BYTES, shared.tops, shared.bytes, p.width, TILE_ROWS);
    part.rows = min(TILE_ROWS, p.rows - row);
    part.blocks = max(0, min(p.width / 32, static_cast<int>(row_groups / 2) - first_column / 32));

    const unsigned tile = shared_address(tiles) + warp * 2 * TILE_BYTES;
    const int turns = (part.blocks + 1) / 2;
    int at = warp;
    if (at < turns) copy_tile(p, tile, row, first_column + at * TILE_COLUMNS);
    shared.along_rows.make(p.along_rows.signs);
    shared.along_columns.make(p.along_columns.signs);
    shared.scales.make();
    shared.folds.make();
    if (threadIdx.x < TILE_ROWS) shared.tops[threadIdx.x] = 0;
    const Philox row_random(p.along_rows.seed), column_random(p.along_columns.seed);
    __syncthreads();

    unsigned top = 0;  // of row place
    for (int turn = 0; at < turns; at += warps, ++turn) {
        if (at + warps < turns) {
            copy_tile(p, tile + (turn + 1) % 2 * TILE_BYTES, row, first_column + (at + warps) * TILE_COLUMNS);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncwarp();
        const unsigned here = tile + turn % 2 * TILE_BYTES;
        const int column = first_column + at * TILE_COLUMNS;
        {
            const Fragments rotation(shared.along_rows);
            unsigned long long group = (row + g + 8 * (t & 1)) * row_groups + (column / 16 + t / 2);
            for (int b = 0; b < 2; ++b, group += 2) {
                unsigned a[2][8];
                load_rows(a, here, b);
                const Quantized made = quantize<false>(a, rotation, shared.scales, 0, row_random, group, 16 * row_groups,
                                                       p.along_rows.site);
                part.keep(made, 2 * at + b, g, place);
                top = max(top, made.scale);
            }
        }
        {
            const Fragments rotation(shared.along_columns);
            unsigned long long group = (column + g + 8 * (t & 1)) * column_groups + (row / 16 + t / 2);
            const int left = p.cols - column;
            uint8_t* codes = p.codes + (column + g) * (8 * column_groups) + row / 2 + 4 * t;
            uint8_t* scale = p.scales + (column + place) * (column_groups / 2) + row / 32;
            for (int pair = 0; pair < 2; ++pair, group += 32 * column_groups, scale += 16 * column_groups) {
                unsigned a[2][8];
                load_columns(a, here, pair);
                const Quantized made = quantize<false>(a, rotation, shared.scales, 0, column_random, group,
                                                       16 * column_groups, p.along_columns.site);
#pragma unroll
                for (int i = 0; i < 4; ++i, codes += 64 * column_groups) {
                    if (32 * pair + 8 * i + g < left) *reinterpret_cast<unsigned*>(codes) = made.codes[i / 2][i % 2];
                }
                if (32 * pair + place < left) *scale = made.scale;
            }
        }
        __syncwarp();
    }
    atomicMax(&shared.tops[place], top);
    __syncthreads();
    part.combine(TILE_ROWS);
    if (rank == 0 && threadIdx.x < part.rows) {
        p.row_scales[row + threadIdx.x] = __uint_as_float(shared.bytes[threadIdx.x] << 23);
    }
    part.fold(p.values + row * (16 * row_groups) + first_column, 16 * row_groups, shared.folds, p.inexact);
    Part::leave();
}

}  // namespace quartet
