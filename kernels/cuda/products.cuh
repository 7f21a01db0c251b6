// Products with ±H32 by wgmma: both operands in shared memory, sums in registers, asynchronous.
//
// A tile has 64 rows of 64 bfloat16, 128 bytes each, whose chunks of 16 bytes lie as the 128-byte swizzle has them. Its
// rows are an operand as they lie, and its columns are one by the other major.

#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace quartet {

constexpr int SIDE = 64, TILE_BYTES = SIDE * SIDE * 2, GROUP = 128;  // of a tile, and the threads of a warpgroup

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ inline int lane_id() { return threadIdx.x % 32; }

// Stays in a register: the compiler would compute it anew in each turn of a loop.
template <typename T>
__device__ inline T kept(T value) {
    asm volatile("" : "+r"(value));
    return value;
}

// The thread's warpgroup, as a number that a warp is known to share.
__device__ inline int group_id() { return __shfl_sync(~0u, threadIdx.x / GROUP, 0); }

// Four matrices of eight rows of 16 bytes: a lane has word lane % 4 of row lane / 4 of each, and the address of row
// lane % 8 of matrix lane / 8.
__device__ inline void store_matrices(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ inline void store(unsigned address, unsigned word) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(word) : "memory");
}

// Which 16 rows or columns of a tile the warp has, of its warpgroup.
__device__ inline int warp_in_group() { return threadIdx.x / 32 % 4; }

// Byte offset of chunk 0…7 of 16 bytes in a row of 128, from an address that is a multiple of 1024.
__device__ inline unsigned swizzled(int row, int chunk) { return row * 128 + ((chunk ^ row & 7) << 4); }

// The low word of an operand's descriptor, for the 128-byte swizzle with eight rows of 128 bytes after eight; it counts
// 16 bytes. The high word has the swizzle and the same distance once more, for operands of the other major.
__device__ inline unsigned operand(unsigned address) { return address / 16 | 64 << 16; }

// The threads of a warpgroup wait for each other.
__device__ inline void wait_for(int group) { asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory"); }

// What the thread wrote to shared memory, products read once all have waited for each other.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// diag(signs) · H32 without its factor, as one B operand or two beside each other; H[k][c] = (−1)^popcount(k & c).
// Row n of an operand is column 8 (n % 8 / 2) + 2 (n / 8) + n % 2, so a lane gets eight columns that follow each other.
struct Rotation {
    uint4 chunks[256];

    __device__ void make(int operands, const float* first, const float* second) {
        unsigned negative[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float* signs = i ? second : first;
            negative[i] = __ballot_sync(~0u, signs != nullptr && signs[lane_id()] < 0.0f);
        }
        for (int i = threadIdx.x; i < 128 * operands; i += blockDim.x) {
            const int part = i % 4, n = i / 4 % 32, column = 8 * (n % 8 / 2) + 2 * (n / 8) + n % 2;
            unsigned minus = i < 128 ? negative[0] : negative[1];  // bit k: of the operand at k and n
            minus ^= (column & 1 ? 0xAAAAAAAA : 0) ^ (column & 2 ? 0xCCCCCCCC : 0) ^ (column & 4 ? 0xF0F0F0F0 : 0)
                     ^ (column & 8 ? 0xFF00FF00 : 0) ^ (column & 16 ? 0xFFFF0000 : 0);
            minus >>= 8 * part;
            const auto pair = [&](int k) {
                return 0x3F803F80 ^ (minus << 15 - k & 0x8000) ^ (minus << 30 - k & 0x80000000);
            };
            chunks[swizzled(n, i / 128 * 4 + part) / 16] = {pair(0), pair(2), pair(4), pair(6)};
        }
    }
};

// What lane 4 g + t of warp w has of 64 rows of 32 sums: values[j][0..1] of row 16 w + g and values[j][2..3] of row
// 16 w + g + 8, which are those of the columns from 8 t on.
struct Sums {
    float values[4][4];

    // Start to multiply 32 columns of a tile's rows (or, where TURNED, 32 rows of its columns) by a rotation.
    template <bool TURNED>
    __device__ void multiply(unsigned a, unsigned b) {
        float(&d)[4][4] = values;
        asm volatile(
            "{\n.reg .pred zero, more;\n.reg .b64 a, b;\n"
            "setp.ne.u32 zero, %20, %20;\nsetp.eq.u32 more, %20, %20;\n"
            "mov.b64 a, {%16, %20};\nmov.b64 b, {%18, %20};\n"
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
            "%12, %13, %14, %15}, a, b, zero, 1, 1, %21, 0;\n"
            "mov.b64 a, {%17, %20};\nmov.b64 b, {%19, %20};\n"
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
            "%12, %13, %14, %15}, a, b, more, 1, 1, %21, 0;\n}"
            : "=f"(d[0][0]), "=f"(d[0][1]), "=f"(d[0][2]), "=f"(d[0][3]), "=f"(d[1][0]), "=f"(d[1][1]), "=f"(d[1][2]),
              "=f"(d[1][3]), "=f"(d[2][0]), "=f"(d[2][1]), "=f"(d[2][2]), "=f"(d[2][3]), "=f"(d[3][0]), "=f"(d[3][1]),
              "=f"(d[3][2]), "=f"(d[3][3])
            : "r"(a), "r"(a + (TURNED ? 16 * 128 : 32) / 16), "r"(b), "r"(b + 32 / 16), "r"(0x40000040),
              "n"(TURNED ? 1 : 0));
    }

    static __device__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

    static __device__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

    // Wait for all products. Their sums are there after ``arrive`` of each.
    static __device__ void finish() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

    __device__ void arrive() {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            asm volatile("" : "+f"(values[j][0]), "+f"(values[j][1]), "+f"(values[j][2]), "+f"(values[j][3])
                         :: "memory");
        }
    }
};

}  // namespace quartet
