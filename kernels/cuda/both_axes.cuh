// A bfloat16 matrix quantised along its rows, to E4M3 with a scale a row, and along its columns, to packed codes: one
// read. A cluster of thread blocks has 64 rows and keeps their codes until the largest scale of each row is known.

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

// What a thread copies of a tile: 16 bytes of four rows, 16 rows apart.
struct Copy {
    const __nv_bfloat16* from;
    unsigned to;
    int row, column;

    __device__ Copy(const BothAxes& p, unsigned tile, int first_row, int first_column) {
        const int thread = threadIdx.x % GROUP, r = thread / 8, chunk = thread % 8;
        row = first_row + r, column = first_column + 8 * chunk;
        from = p.x + row * p.stride + column, to = tile + swizzled(r, chunk);
    }

    // Start to copy a tile, with zeros beyond the matrix; the next one is ``columns`` further.
    __device__ void start(const BothAxes& p, int turn, int columns) {
        const unsigned tile = to + turn % 2 * TILE_BYTES;
        const auto* at = from;
#pragma unroll
        for (int i = 0; i < 4; ++i, at += 16 * p.stride) {
            const int bytes = row + 16 * i < p.rows && column < p.cols ? 16 : 0;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(tile + i * 2048), "l"(at), "r"(bytes) : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        from += columns, column += columns;
    }
};

// Where a lane writes a block of a column of each tile: two blocks of a column are a whole sector.
struct Columns {
    uint8_t *codes, *scales;
    int left;  // columns from the lane's on that there are to write

    __device__ Columns(const BothAxes& p, const Lane& lane, int row, int first) {
        const int block = row / 32 + lane.block;
        const int64_t blocks = (p.rows + 31) / 32, at = (first + lane.row) * blocks + block;
        codes = p.codes + 16 * at, scales = p.scales + at;
        left = kept(block < blocks ? p.cols - (first + lane.row) : 0);
    }

    // The next tile is ``columns`` further, where a column has ``blocks``.
    __device__ void write(const Quantized& made, const Lane& lane, int columns, int blocks) {
        const uint4 words = made.whole(lane);
        if (left > 0) *reinterpret_cast<uint4*>(codes) = words, *scales = made.scale;
        const int64_t step = int64_t{columns} * blocks;
        left -= columns, codes += 16 * step, scales += step;
    }
};

__device__ inline void quantize_both_axes(const BothAxes& p, int cluster) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const int groups = blockDim.x / GROUP, own = group_id(), warp = warp_in_group();
    const int rank = blockIdx.x % cluster;
    const int row = blockIdx.x / cluster * SIDE, first_column = rank * p.width;
    const unsigned row_groups = (p.cols + 31) / 32 * 2, column_groups = (p.rows + 31) / 32 * 2;
    auto& shared = *reinterpret_cast<Shared*>(memory + groups * 2 * TILE_BYTES);
    Part part(shared, reinterpret_cast<uint8_t*>(&shared + 1), p.width);
    part.rows = min(SIDE, p.rows - row);
    part.blocks = max(0, min(p.width / 32, static_cast<int>(row_groups / 2) - first_column / 32));

    const unsigned tiles = shared_address(memory) + own * 2 * TILE_BYTES;
    const int turns = (part.blocks + 1) / 2, column = first_column + own * SIDE, step = groups * SIDE;
    Copy copy(p, tiles, row, column);
    if (own < turns) copy.start(p, 0, step);
    shared.rotation.make(2, p.along_rows.signs, p.along_columns.signs);
    publish();
    shared.folds.make();
    if (threadIdx.x < SIDE) shared.tops[threadIdx.x] = 0;
    const Philox row_random(p.along_rows), column_random(p.along_columns);
    __syncthreads();

    const unsigned rotations = operand(shared_address(&shared.rotation));
    const Lane lane;
    const int line = 16 * warp + lane.row;
    unsigned row_group = kept((row + line) * row_groups + column / 16 + lane.block);
    unsigned column_group = kept((column + line) * column_groups + row / 16 + lane.block);
    Keeper keeper(lane, part.codes, part.scales, part.pitch, part.bytes, 2 * own);
    Columns columns(p, lane, row, column + 16 * warp);
    for (int ahead = kept(turns - own), turn = 0; ahead > 0; ahead -= groups, ++turn) {
        const unsigned tile = operand(tiles + turn % 2 * TILE_BYTES);
        asm volatile("cp.async.wait_all;" ::: "memory");
        publish();
        wait_for(own);
        Sums sums[2];
        Sums::begin();
        sums[0].multiply<false>(tile, rotations);
        sums[1].multiply<false>(tile + 64 / 16, rotations);
        Sums::commit();
        if (ahead > groups) copy.start(p, turn + 1, step);
        {
            const Random random(row_random, lane, row_group);
            Sums::finish();
            for (auto& each : sums) each.arrive();
            keeper.keep(quantize<0>(sums, lane, random), 2 * groups);
        }
        Sums::begin();
        sums[0].multiply<true>(tile, rotations + 64 / 16);
        sums[1].multiply<true>(tile + 32 * 128 / 16, rotations + 64 / 16);
        Sums::commit();
        {
            const Random random(column_random, lane, column_group);
            Sums::finish();
            for (auto& each : sums) each.arrive();
            columns.write(quantize<0>(sums, lane, random), lane, step, column_groups / 2);
        }
        row_group += step / 16, column_group += step * column_groups;
    }
    part.combine(keeper);
    if (rank == 0 && threadIdx.x < part.rows) {
        p.row_scales[row + threadIdx.x] = __uint_as_float(shared.bytes[threadIdx.x] << 23);
    }
    part.fold(p.values + row * (int64_t{16} * row_groups) + first_column, int64_t{16} * row_groups, p.inexact);
    Part::leave();
}

}  // namespace quartet
