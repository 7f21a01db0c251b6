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

// Four E4M3 bytes of four nibbles, those above them are ignored; see quartet.kernels.triton.quantize.fold.
__device__ inline unsigned folded(unsigned nibbles, uint2 table) {
    const unsigned magnitude = __byte_perm(table.x, table.y, nibbles & 0x7777);
    unsigned sign;  // bit 3 of a selector spreads a byte's sign: 0xFF for a negative code, else 0x80
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(sign) : "r"(0x80808080), "r"(nibbles));
    return magnitude | (sign << 7 & 0x80808080);
}

// Rows of codes and scales in shared memory, a part of a matrix's rows whose other parts the blocks of the cluster have.
struct Part {
    uint8_t *codes, *scales;
    unsigned* tops;      // largest word of a scale of each row
    int* bytes_of_rows;  // of the scales of the whole rows
    int pitch, bytes;    // from row to row, of codes and of scales
    int rows, blocks;    // that there are to write

    // ``width`` elements of each of ``height`` rows, in shared memory from ``memory`` on.
    __device__ Part(uint8_t* memory, unsigned* tops, int* bytes_of_rows, int width, int height)
        : codes(memory), scales(memory + height * (width / 2 + PAD)), tops(tops), bytes_of_rows(bytes_of_rows),
          pitch(width / 2 + PAD), bytes(width / 32 + 4) {}

    // A block of 32 rows, of which a lane has those from ``row`` on, eight apart, and the scale of row ``place``.
    __device__ void keep(const Quantized& made, int block, int row, int place) const {
        uint8_t* to = codes + row * pitch + block * 16 + 4 * (lane_id() % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i, to += 8 * pitch) *reinterpret_cast<unsigned*>(to) = made.codes[i / 2][i % 2];
        scales[place * bytes + block] = made.scale;
    }

    // From the largest words of this block's part of each row in ``tops``, the bytes of the whole rows' scales, in every
    // block of the cluster. None of them may end before all have called ``leave``.
    __device__ void combine(int height) const {
        const auto cluster = cooperative_groups::this_cluster();
        cluster.sync();
        unsigned top = 0;
        if (threadIdx.x < height) {
            for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
                top = max(top, cluster.map_shared_rank(tops, rank)[threadIdx.x]);
            }
        }
        asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
        if (threadIdx.x < height) bytes_of_rows[threadIdx.x] = max(static_cast<int>(top >> 8) - TOP, 1);
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
    __device__ void fold(uint8_t* values, int64_t stride, const FoldTable& table, unsigned long long* inexact) const {
        int lost = 0;
        for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
            const int scale = bytes_of_rows[row];
            for (int half = lane_id(); half < 2 * blocks; half += 32) {
                const int byte = scales[row * bytes + half / 2], down = byte - scale;
                const uint8_t* at = codes + row * pitch + 8 * half;
                const uint2 words = *reinterpret_cast<const uint2*>(at);
                if (down < -8 && half % 2 == 0) {
                    const uint4 all = *reinterpret_cast<const uint4*>(at);
                    lost += ((all.x | all.y | all.z | all.w) & 0x77777777) != 0;
                }
                const uint2 entry = table.rows[byte == 255 ? NAN_ROW : min(max(down, LOWEST), TOP) - LOWEST];
                const uint4 out = {folded(words.x, entry), folded(words.x >> 16, entry), folded(words.y, entry),
                                   folded(words.y >> 16, entry)};
                *reinterpret_cast<uint4*>(values + row * stride + 16 * half) = out;
            }
        }
        if (lost) atomicAdd(inexact, static_cast<unsigned long long>(lost));
    }
};

}  // namespace quartet
