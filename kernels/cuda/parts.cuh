// Rows of codes that the thread blocks of a cluster keep in shared memory until the scale of each row is known: MXFP4
// rows as E4M3 rows with one power-of-two scale, as quartet.kernels.reference.chains.fold has them.

#pragma once

#include <cooperative_groups.h>
#include <cuda_fp8.h>

#include "blocks.cuh"

namespace quartet {

constexpr int TOP = 6, LOWEST = -24;       // powers of two between a row's scale and its blocks'
constexpr int NAN_ROW = TOP - LOWEST + 1;  // of the table
constexpr int PAD = 16;                    // bytes between rows of codes, against bank conflicts

__device__ inline float power_of_two(int exponent) { return __uint_as_float((exponent + 127) << 23); }

// E4M3 bytes of the eight E2M1 magnitudes times 2^d, row d + 24; the last row is NaN.
struct FoldTable {
    uint2 rows[32];

    __device__ void make() {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            const int row = i / 8, index = i % 8;
            const float value = index < 2 ? 0.5f * index : (index % 2 ? 1.5f : 1.0f) * power_of_two(index / 2 - 1);
            const auto byte = __nv_cvt_float_to_fp8(value * power_of_two(row + LOWEST), __NV_SATFINITE, __NV_E4M3);
            reinterpret_cast<uint8_t*>(rows)[i] = row == NAN_ROW ? 0x7F : byte;
        }
    }
};

// Bytes, with their signs, that a table has for the magnitudes of eight codes.
__device__ inline uint2 looked_up(unsigned codes, uint2 table) {
    const unsigned magnitudes = codes & 0x77777777, low = codes << 4;  // each nibble's sign at the end of a byte
    return {__byte_perm(table.x, table.y, magnitudes) | (__byte_perm(low, codes, 0x5140) & 0x80808080),
            __byte_perm(table.x, table.y, magnitudes >> 16) | (__byte_perm(low, codes, 0x7362) & 0x80808080)};
}

// What the thread blocks have in shared memory beside tiles and a part.
struct Shared {
    Rotation rotation;
    FoldTable folds;
    unsigned tops[SIDE];
    int bytes[SIDE];
};

// Where a warp puts codes and scales of two blocks of each row at a time, in shared memory, and the largest such scale.
struct Keeper {
    unsigned codes, scale;
    int row, top;

    // The first two blocks are those from ``block`` on.
    __device__ Keeper(const Lane& lane, const uint8_t* codes_of_part, const uint8_t* scales_of_part, int pitch,
                      int bytes, int block) : row(16 * warp_in_group() + lane.row), top(0) {
        const int id = lane_id();
        const int place = (16 * warp_in_group() + id % 16) * pitch + (block + id / 16) * 16;
        codes = kept(shared_address(codes_of_part) + place);
        scale = kept(shared_address(scales_of_part) + row * bytes + block + lane.block);
    }

    __device__ void keep(const Quantized& made, int blocks) {
        store_matrices(codes, made.codes[0][0], made.codes[0][1], made.codes[1][0], made.codes[1][1]);
        asm volatile("st.shared.u8 [%0], %1;" :: "r"(scale), "r"(made.scale) : "memory");
        top = max(top, made.top);
        codes += 16 * blocks, scale += blocks;
    }
};

// Codes and scales of 64 rows in shared memory, a part of a matrix's rows; the blocks of the cluster have the others.
struct Part {
    Shared& shared;
    uint8_t *codes, *scales;
    int pitch, bytes;  // from row to row, of codes and of scales
    int rows, blocks;  // that there are to write

    // ``width`` elements of each row, in shared memory from ``memory`` on.
    __device__ Part(Shared& shared, uint8_t* memory, int width)
        : shared(shared), codes(memory), scales(memory + SIDE * (width / 2 + PAD)), pitch(width / 2 + PAD),
          bytes(width / 32 + 4) {}

    // From the largest scales that the threads kept, the bytes of the whole rows' scales, in every block of the
    // cluster. None of them may end before all have called ``leave``.
    __device__ void combine(const Keeper& keeper) const {
        atomicMax(&shared.tops[keeper.row], keeper.top);
        const auto cluster = cooperative_groups::this_cluster();
        cluster.sync();
        unsigned all = 0;
        if (threadIdx.x < SIDE) {
            for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
                all = max(all, cluster.map_shared_rank(shared.tops, rank)[threadIdx.x]);
            }
        }
        asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
        if (threadIdx.x < SIDE) shared.bytes[threadIdx.x] = max(static_cast<int>(all) - TOP, 1);
        __syncthreads();
    }

    __device__ static void leave() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

    // Codes and scales, to rows of 8 · groups and groups / 2 bytes.
    __device__ void write(uint8_t* to, uint8_t* scales_to, int64_t groups) const {
        for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
            for (int i = lane_id(); i < blocks; i += 32) {
                *reinterpret_cast<uint4*>(to + row * (8 * groups) + 16 * i) =
                    *reinterpret_cast<const uint4*>(codes + row * pitch + 16 * i);
                scales_to[row * (groups / 2) + i] = scales[row * bytes + i];
            }
        }
    }

    // E4M3 values, from ``values`` on, of rows ``stride`` apart; counts blocks that may not fold exactly.
    __device__ void fold(uint8_t* values, int64_t stride, unsigned long long* inexact) const {
        int lost = 0;
        for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
            const int scale = shared.bytes[row];
            const uint8_t* from = codes + row * pitch;
            const uint8_t* scales_from = scales + row * bytes;
            uint8_t* to = values + row * stride;
#pragma unroll 2
            for (int half = lane_id(); half < 2 * blocks; half += 32) {
                const int byte = scales_from[half / 2], down = byte - scale;
                const uint2 words = *reinterpret_cast<const uint2*>(from + 8 * half);
                const uint2 table = shared.folds.rows[byte == 255 ? NAN_ROW : min(max(down, LOWEST), TOP) - LOWEST];
                if (down < -8) {
                    const uint4 all = *reinterpret_cast<const uint4*>(from + 16 * (half / 2));
                    lost += half % 2 == 0 && ((all.x | all.y | all.z | all.w) & 0x77777777) != 0;
                }
                const uint2 low = looked_up(words.x, table), high = looked_up(words.y, table);
                *reinterpret_cast<uint4*>(to + 16 * half) = {low.x, low.y, high.x, high.y};
            }
        }
        if (lost) atomicAdd(inexact, static_cast<unsigned long long>(lost));
    }
};

}  // namespace quartet
