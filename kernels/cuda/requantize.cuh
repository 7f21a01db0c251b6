// The transpose of packed MXFP4 codes, rotated and quantised anew: packed, and to E4M3 with a scale a row. A cluster of
// thread blocks has 64 columns of a matrix, which are rows of the result, and keeps their codes until the end.

#pragma once

#include "parts.cuh"

namespace quartet {

struct Requantize {
    const uint8_t *codes, *scales;    // [matrices · rows, cols / 2] and [matrices · rows, cols / 32]
    Chain chain;
    uint8_t *turned, *turned_scales;  // [matrices · cols, padded rows / 2] and [… / 32], or null
    uint8_t* values;                  // [matrices · cols, padded rows], or null
    float* row_scales;                // [matrices · cols]
    unsigned long long* inexact;
    int rows, cols, height;           // rows of a thread block, a multiple of 32; those of the cluster cover a column
};

struct RequantizeShared {
    Rotation rotation;
    ScaleTable scales;
    FoldTable folds;
    unsigned tops[TILE_COLUMNS];
    int bytes[TILE_COLUMNS];
};

// The 32 codes of a row as bfloat16, times a power of two given as one twice, in the order 0 4 1 5 2 6 3 7 of each eight:
// as the low bits of a bfloat16's exponent and the first of its significand a code is its value · 2^-126.
__device__ inline void expand(uint8_t* row, int first_chunk, int swizzle, uint4 codes, unsigned power) {
    const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        unsigned out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned sign = 4 * i <= 12 ? words[w] << (12 - 4 * i) : 0;
            const unsigned rest = 4 * i <= 6 ? words[w] << (6 - 4 * i) : words[w] >> (4 * i - 6);
            const unsigned value = (sign & 0x80008000) | (rest & 0x01C001C0);
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[i]) : "r"(value), "r"(power), "r"(0x80008000));
        }
        *reinterpret_cast<uint4*>(row + ((first_chunk + w ^ swizzle) << 4)) = {out[0], out[1], out[2], out[3]};
    }
}

__device__ inline void requantize_transpose(const Requantize& p, int cluster) {
    extern __shared__ __align__(128) uint8_t memory[];
    auto& shared = *reinterpret_cast<RequantizeShared*>(memory);
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % cluster, first_row = rank * p.height;
    const int first_column = blockIdx.x / cluster * TILE_COLUMNS;
    const int64_t above = int64_t(blockIdx.y) * p.rows, above_out = int64_t(blockIdx.y) * p.cols + first_column;
    const int64_t groups = (p.rows + 31) / 32 * 2;
    uint8_t* const tile = memory + sizeof(RequantizeShared) + warp * TILE_BYTES;
    Part part(memory + sizeof(RequantizeShared) + warps * TILE_BYTES, shared.tops, shared.bytes, p.height, TILE_COLUMNS);
    part.rows = min(TILE_COLUMNS, p.cols - first_column);
    part.blocks = max(0, min(p.height / 32, static_cast<int>(groups / 2) - first_row / 32));

    const int64_t at = (above + first_row + 32 * warp + lane) * (p.cols / 32) + first_column / 32;  // in blocks
    const auto* codes = reinterpret_cast<const uint4*>(p.codes) + at;
    const uint8_t* scales = p.scales + at;
    const bool both = first_column + 32 < p.cols;
    uint4 words[2];
    int bytes[2];
    const auto load = [&](int block) {
        const bool inside = first_row + 32 * block + lane < p.rows;
        words[0] = words[1] = {0, 0, 0, 0};
        bytes[0] = bytes[1] = 0;
        if (inside) words[0] = __ldg(codes), bytes[0] = __ldg(scales);
        if (inside && both) words[1] = __ldg(codes + 1), bytes[1] = __ldg(scales + 1);
        codes += warps * p.cols, scales += warps * p.cols;
    };
    if (warp < part.blocks) load(warp);
    shared.rotation.make(p.chain.signs);
    shared.scales.make();
    shared.folds.make();
    if (threadIdx.x < TILE_COLUMNS) shared.tops[threadIdx.x] = 0;
    const Philox draw(p.chain.seed);
    __syncthreads();

    const Fragments rotation(shared.rotation);
    const int mine = g / 2 + 4 * (g & 1);  // the column of each eight that expand puts at place g
    const int place = Quantized::place() - g + mine;
    unsigned long long group = (above_out + mine + 8 * (t & 1)) * groups + (first_row / 16 + 2 * warp + t / 2);
    unsigned tops[2] = {};
    for (int block = warp; block < part.blocks; block += warps, group += 2 * warps) {
        int largest[2];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            largest[b] = __reduce_max_sync(~0u, bytes[b] == 255 ? 0 : bytes[b]);
            const unsigned power = bytes[b] == 255 ? 0x7FC0 : max(253 + bytes[b] - largest[b], 0) << 7;
            expand(tile + lane * 128, 4 * b, lane & 7, words[b], power * 0x10001);
        }
        __syncwarp();
        if (block + warps < part.blocks) load(block + warps);
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            unsigned a[2][8];
            load_columns(a, shared_address(tile), b);
            const Quantized made = quantize<true>(a, rotation, shared.scales, largest[b] - 127, draw,
                                                  group + 32 * b * groups, 16 * groups, p.chain.site);
            part.keep(made, block, 32 * b + mine, 32 * b + place);
            tops[b] = max(tops[b], made.scale);
        }
        __syncwarp();
    }
    atomicMax(&shared.tops[place], tops[0]);
    atomicMax(&shared.tops[32 + place], tops[1]);
    __syncthreads();
    if (p.turned != nullptr) {
        part.write(p.turned + above_out * (8 * groups) + first_row / 2, p.turned_scales + above_out * (groups / 2)
                   + first_row / 32, groups);
    }
    if (p.values == nullptr) return;
    part.combine(TILE_COLUMNS);
    if (rank == 0 && threadIdx.x < part.rows) {
        p.row_scales[above_out + threadIdx.x] = __uint_as_float(shared.bytes[threadIdx.x] << 23);
    }
    part.fold(p.values + above_out * (16 * groups) + first_row, 16 * groups, shared.folds, p.inexact);
    Part::leave();
}

}  // namespace quartet
