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
    int rows, cols, height;           // rows of a thread block, a multiple of 64; those of the cluster cover a column
};

constexpr int SHIFT = 2;  // values are four times larger, so that none is below bfloat16's normal numbers

// Codes as bfloat16 times 2^SHIFT.
struct Expansion {
    uint2 high, low;  // bytes of the eight magnitudes

    __device__ Expansion() : high{kept(0x3F3F3F00u), kept(0x40404040u)}, low{kept(0xC0800000u), kept(0xC0804000u)} {}

    // A block's codes, to four chunks of a row of a tile, whose addresses are ``to`` but for bits 4 and 5.
    __device__ void write(unsigned to, uint4 codes, int scale) const {
        const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
        const unsigned power = (scale + SHIFT) * 0x00800080;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const uint2 top = looked_up(words[w], high);
            const unsigned magnitudes = words[w] & 0x77777777;
            const uint2 end = {__byte_perm(low.x, low.y, magnitudes), __byte_perm(low.x, low.y, magnitudes >> 16)};
            unsigned out[4] = {__byte_perm(end.x, top.x, 0x5140), __byte_perm(end.x, top.x, 0x7362),
                               __byte_perm(end.y, top.y, 0x5140), __byte_perm(end.y, top.y, 0x7362)};
#pragma unroll
            for (int i = 0; i < 4; ++i) asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(out[i]) : "r"(power));
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                         :: "r"(to ^ 16 * w), "r"(out[0]), "r"(out[1]), "r"(out[2]), "r"(out[3]) : "memory");
        }
        if (scale > 254 - SHIFT) replace(to, words, scale);
    }

  private:
    // What is not finite as bfloat16: NaN, and from 2^125 on, where a NaN scale is as right; zeros are zeros.
    __device__ static void replace(unsigned to, const unsigned (&words)[4], int scale) {
        const unsigned one = scale == 255 ? 0x7FC0 : 0x7F80, zero = scale == 255 ? 0x7FC0 : 0;
#pragma unroll 1
        for (int i = 0; i < 16; ++i) {
            const unsigned pair = (i < 8 ? i < 4 ? words[0] : words[1] : i < 12 ? words[2] : words[3]) >> i % 4 * 8;
            store((to ^ i / 4 * 16) + i % 4 * 4, (pair & 0x70 ? one : zero) << 16 | (pair & 7 ? one : zero));
        }
    }
};

__device__ inline void requantize_transpose(const Requantize& p, int cluster) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const int groups = blockDim.x / GROUP, own = group_id(), warp = warp_in_group();
    const int rank = blockIdx.x % cluster, first_row = rank * p.height;
    const int first_column = blockIdx.x / cluster * SIDE;
    const int64_t above = int64_t{blockIdx.y} * p.rows, above_out = int64_t{blockIdx.y} * p.cols + first_column;
    const unsigned row_groups = (p.rows + 31) / 32 * 2;
    auto& shared = *reinterpret_cast<Shared*>(memory + groups * TILE_BYTES);
    Part part(shared, reinterpret_cast<uint8_t*>(&shared + 1), p.height);
    part.rows = min(SIDE, p.cols - first_column);
    part.blocks = max(0, min(p.height / 32, static_cast<int>(row_groups / 2) - first_row / 32));

    // A thread has one block of a row of each tile.
    const int turns = (part.blocks + 1) / 2, line = threadIdx.x % GROUP / 2, half = threadIdx.x % 2;
    const int row = first_row + own * SIDE + line, block = first_column / 32 + half;
    const int64_t at = (above + row) * (p.cols / 32) + block;
    const int step = kept(groups * SIDE * (p.cols / 32));
    const auto* codes = reinterpret_cast<const uint4*>(p.codes) + at;
    const uint8_t* scales = p.scales + at;
    int left = kept(32 * block < p.cols ? p.rows - row : 0);
    uint4 words = {0, 0, 0, 0};
    int scale = 0;
    const auto load = [&] {
        if (left > 0) words = __ldg(codes), scale = __ldg(scales);
        else words = {0, 0, 0, 0}, scale = 0;
        codes += step, scales += step, left -= groups * SIDE;
    };
    if (own < turns) load();
    shared.rotation.make(1, p.chain.signs, nullptr);
    publish();
    shared.folds.make();
    if (threadIdx.x < SIDE) shared.tops[threadIdx.x] = 0;
    const Philox draw(p.chain);
    __syncthreads();

    const Lane lane;
    const Expansion expansion;
    const unsigned tile = shared_address(memory) + own * TILE_BYTES, to = kept(tile + swizzled(line, 4 * half));
    const unsigned columns = operand(tile);
    const unsigned rotation = operand(shared_address(&shared.rotation));
    unsigned random_group = kept(static_cast<unsigned>(above_out + 16 * warp + lane.row) * row_groups + first_row / 16
                                 + 4 * own + lane.block);
    Keeper keeper(lane, part.codes, part.scales, part.pitch, part.bytes, 2 * own);
    for (int ahead = kept(turns - own); ahead > 0; ahead -= groups) {
        expansion.write(to, words, scale);
        publish();
        wait_for(own);
        Sums sums[2];
        Sums::begin();
        sums[0].multiply<true>(columns, rotation);
        sums[1].multiply<true>(columns + 32 * 128 / 16, rotation);
        Sums::commit();
        if (ahead > groups) load();
        const Random random(draw, lane, random_group);
        Sums::finish();
        for (auto& each : sums) each.arrive();
        wait_for(own);
        keeper.keep(quantize<SHIFT>(sums, lane, random), 2 * groups);
        random_group += 4 * groups;
    }
    __syncthreads();
    if (p.turned != nullptr) {
        part.write(p.turned + above_out * (8 * row_groups) + first_row / 2,
                   p.turned_scales + above_out * (row_groups / 2) + first_row / 32, row_groups);
    }
    if (p.values == nullptr) return;
    part.combine(keeper);
    if (rank == 0 && threadIdx.x < part.rows) {
        p.row_scales[above_out + threadIdx.x] = __uint_as_float(shared.bytes[threadIdx.x] << 23);
    }
    part.fold(p.values + above_out * (int64_t{16} * row_groups) + first_row, int64_t{16} * row_groups, p.inexact);
    Part::leave();
}

}  // namespace quartet
