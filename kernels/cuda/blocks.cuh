// Device functions on blocks of 32 that a warp rotates on its tensor cores and rounds to E2M1 with E8M0 scales.
//
// A warp's lane is 4 g + t. A product of 16 rows by H32 leaves to it eight consecutive elements of the rows g and g + 8,
// those from 8 t on: a 32-bit word of codes each. Random bits are those of quartet.kernels.reference.philox.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quartet {

constexpr float ROOT = 0.17677669529663687f;  // 1/√32

// What one orientation of a quantiser is given: 32 signs of the rotation or none, seed and site of its random bits.
struct Chain {
    const float* signs;
    const long long* seed;
    unsigned site;
};

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ inline float power_of_two(int exponent) { return __uint_as_float((exponent + 127) << 23); }

__device__ inline int lane_id() { return threadIdx.x % 32; }

// diag(signs) · H32 without its factor, as the B operand of eight m16n8k16 products; H[k][c] = (−1)^popcount(k & c).
// Position n of tile j is column 8 (n / 2) + 2 j + n % 2. A thread block writes it once, its warps read it.
struct Rotation {
    uint4 words[4][32];  // of a tile and a lane: the four registers of both halves of k

    __device__ void make(const float* signs) {
        const unsigned negative = __ballot_sync(~0u, signs != nullptr && signs[lane_id()] < 0.0f);
        for (int i = threadIdx.x; i < 512; i += blockDim.x) {
            const int part = i % 4, lane = i / 4 % 32, tile = i / 128;
            const int column = 8 * (lane / 8) + 2 * tile + lane / 4 % 2, k = 8 * part + 2 * (lane % 4);
            const unsigned low = __popc(k & column) + (negative >> k);
            const unsigned high = __popc((k + 1) & column) + (negative >> (k + 1));
            reinterpret_cast<unsigned*>(words)[i] = 0x3F803F80 ^ (low & 1) << 15 ^ (high & 1) << 31;  // two of ±1
        }
    }
};

// Those registers of a lane.
struct Fragments {
    uint4 words[4];

    __device__ explicit Fragments(const Rotation& rotation) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = rotation.words[j][lane_id()];
    }
};

// Sixteen rows of 32 raw sums: values[j][0..1] of row g and values[j][2..3] of row g + 8.
struct Sums {
    float values[4][4];

    // a: eight registers of the A operand, four for each half of k.
    __device__ Sums(const unsigned (&a)[8], const Fragments& b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float(&d)[4] = values[j];
            d[0] = d[1] = d[2] = d[3] = 0.0f;
            step(d, a, b.words[j].x, b.words[j].y);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) step(values[j], a + 4, b.words[j].z, b.words[j].w);
    }

  private:
    __device__ static void step(float (&d)[4], const unsigned* a, unsigned b0, unsigned b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

__device__ inline void load_matrices(unsigned* a, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

__device__ inline void load_transposed(unsigned* a, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

// Philox4x32-10 with a seed's keys of each round.
struct Philox {
    unsigned low, high;

    __device__ explicit Philox(const long long* seed) {
        const unsigned long long key = *seed;
        low = static_cast<unsigned>(key), high = static_cast<unsigned>(key >> 32);
    }

    __device__ uint4 operator()(unsigned long long group, unsigned site) const {
        uint4 c = {static_cast<unsigned>(group), static_cast<unsigned>(group >> 32), site, 0};
#pragma unroll
        for (unsigned i = 0; i < 10; ++i) {
            const uint2 p = product(c.x, 0xD2511F53), q = product(c.z, 0xCD9E8D57);
            c = {q.y ^ c.y ^ (low + i * 0x9E3779B9u), q.x, p.y ^ c.w ^ (high + i * 0xBB67AE85u), p.x};
        }
        return c;
    }

  private:
    __device__ static uint2 product(unsigned a, unsigned b) {  // low and high word, by one instruction
        uint2 out;
        asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }"
            : "=r"(out.x), "=r"(out.y) : "r"(a), "r"(b));
        return out;
    }
};

// Two words of random bits for the eight elements of row g, and two for those of row g + 8. ``call``: that of the group
// of 16 that starts 16 (t / 2) into the block of row g, with t odd of row g + 8; two lanes then swap halves.
__device__ inline uint4 shared_draw(uint4 call) {
    const bool odd = lane_id() & 1;
    const unsigned first = __shfl_xor_sync(~0u, odd ? call.x : call.z, 1);
    const unsigned second = __shfl_xor_sync(~0u, odd ? call.y : call.w, 1);
    return odd ? uint4{first, second, call.z, call.w} : uint4{call.x, call.y, first, second};
}

__device__ inline unsigned choose(unsigned mask, unsigned a, unsigned b) { return (a & mask) | (b & ~mask); }

__device__ inline unsigned halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
}

// The codes of eight elements, which ``step`` brings to magnitudes of 6 · 2^-14 at most: as float16 those have 512 times
// the index of E2M1 as their bits, to which nine random ones are added. Elements 4 i + {0, 2} take a word's bits from 0
// and 16 on, 4 i + {1, 3} from 7 and 23 on.
__device__ inline unsigned stochastic_codes(const float (&z)[8], float step, unsigned random0, unsigned random1) {
    constexpr unsigned NINE = 0x01FF01FF;
    const unsigned a = halves(z[0] * step, z[2] * step) + (random0 & NINE);
    const unsigned b = halves(z[4] * step, z[6] * step) + (random1 & NINE);
    const unsigned c = halves(z[1] * step, z[3] * step) + (random0 >> 7 & NINE);
    const unsigned d = halves(z[5] * step, z[7] * step) + (random1 >> 7 & NINE);
    const unsigned even = __byte_perm(a, b, 0x7531), odd = __byte_perm(c, d, 0x7531);
    return choose(0x0F0F0F0F, choose(0x07070707, even >> 1, even >> 4), choose(0x70707070, odd << 3, odd));
}

// What follows from the exponent of a block's largest magnitude by the rule headroom: what brings the raw sums to
// magnitudes of 6 · 2^-14 at most, and a word with the scale's byte, which is in it 256 times too where the scale of a
// row depends on the block, not one of zeros or NaN. Below 2^-124 all is 0, and from 2^110 on the scale is NaN.
struct ScaleTable {
    struct Entry {
        float step;
        unsigned word;
    } entries[256];

    __device__ void make() {
        for (int e = threadIdx.x; e < 256; e += blockDim.x) {
            entries[e] = e <= 2 ? Entry{0.0f, 127} : e >= 237 ? Entry{0.0f, 255}
                : Entry{ROOT * 0.75f * power_of_two(129 - 14 - e), (e - 2u) * 257};
        }
    }
};

// Bits of 1/√32 times the largest magnitude that a lane has of row g, or of row g + 8.
__device__ inline unsigned largest_bits(const float (&v)[4][4], int h) {
    float top[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) top[j] = fmaxf(fabsf(v[j][2 * h]), fabsf(v[j][2 * h + 1]));
    return __float_as_uint(fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])) * ROOT);
}

// What a lane has of 32 rows of a block each: a word of codes of row 16 m + 8 h + g for m, h = 0, 1, and the word of the
// scale of row place().
struct Quantized {
    unsigned codes[2][2], scale;

    __device__ static int place() { return 16 * (lane_id() / 2 % 2) + 8 * (lane_id() % 2) + lane_id() / 4; }
};

// Codes and scales by the rule headroom of the product of two A operands, rounded at random. Sums stand for themselves
// times 2^exponent. ``group``: of random bits, see shared_draw; 16 rows further down it is ``groups`` more.
template <bool MOVED>
__device__ inline Quantized quantize(const unsigned (&a)[2][8], const Fragments& rotation, const ScaleTable& table,
                                     int exponent, const Philox& draw, unsigned long long group, int64_t groups,
                                     unsigned site) {
    const Sums sums[2] = {Sums(a[0], rotation), Sums(a[1], rotation)};
    const uint4 calls[2] = {draw(group, site), draw(group + groups, site)};
    Quantized out;
    unsigned scales[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const uint4 random = shared_draw(calls[m]);
        const float(&v)[4][4] = sums[m].values;
        unsigned powers = largest_bits(v, 0) >> 23 | (largest_bits(v, 1) >> 7 & 0x00FF0000);
        powers = __vmaxu2(powers, __shfl_xor_sync(~0u, powers, 1));
        powers = __vmaxu2(powers, __shfl_xor_sync(~0u, powers, 2));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int power = h ? powers >> 16 : powers & 0xFFFF;
            if (MOVED) power = power == 0 || power == 255 ? power : min(max(power + exponent, 0), 255);
            const auto entry = table.entries[power];
            const float step = MOVED ? entry.step * __uint_as_float(max(exponent + 127, 0) << 23) : entry.step;
            const float z[8] = {v[0][2 * h], v[0][2 * h + 1], v[1][2 * h], v[1][2 * h + 1],
                                v[2][2 * h], v[2][2 * h + 1], v[3][2 * h], v[3][2 * h + 1]};
            out.codes[m][h] = stochastic_codes(z, step, h ? random.z : random.x, h ? random.w : random.y);
            scales[m][h] = entry.word;
        }
    }
    const bool low = lane_id() & 1, high = lane_id() & 2;
    out.scale = high ? (low ? scales[1][1] : scales[1][0]) : (low ? scales[0][1] : scales[0][0]);
    return out;
}

// What a warp has of a matrix at a time: 32 rows of 64 columns.
constexpr int TILE_ROWS = 32, TILE_COLUMNS = 64, TILE_BYTES = TILE_ROWS * TILE_COLUMNS * 2;

// Byte offset of chunk 0…7 of 16 bytes in a row of a tile in shared memory, so that eight rows lie in all banks.
__device__ inline unsigned swizzled(int row, int chunk) { return row * 128 + ((chunk ^ row & 7) << 4); }

// A operands of 32 columns of a tile, those from 32 pair on, as rows.
__device__ inline void load_columns(unsigned (&a)[2][8], unsigned tile, int pair) {
    const int lane = lane_id(), row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const unsigned from = tile + swizzled(row, 4 * pair + 2 * m + lane / 8 % 2);
        load_transposed(a[m], from);
        load_transposed(a[m] + 4, from + 16 * 128);
    }
}

// The same of 32 elements of each row, those from 32 b on.
__device__ inline void load_rows(unsigned (&a)[2][8], unsigned tile, int b) {
    const int lane = lane_id();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        load_matrices(a[m], tile + swizzled(16 * m + lane % 16, 4 * b + lane / 16));
        load_matrices(a[m] + 4, tile + swizzled(16 * m + lane % 16, 4 * b + 2 + lane / 16));
    }
}

}  // namespace quartet
