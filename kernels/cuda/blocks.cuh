// Device functions on blocks of 32 that a warpgroup has rotated and rounds to E2M1 with E8M0 scales.
//
// A warp's lane is 4 g + t; see Sums for what it has. Random bits are those of quartet.kernels.reference.philox.

#pragma once

#include <cuda_fp16.h>

#include "products.cuh"

namespace quartet {

constexpr float ROOT = 0.17677669529663687f;  // 1/√32

// What one orientation of a quantiser is given: 32 signs of the rotation or none, seed and site of its random bits.
struct Chain {
    const float* signs;
    const long long* seed;
    unsigned site;
};

// Philox4x32-10 with a seed's keys, which a warp shares. Groups are below 2^32.
struct Philox {
    unsigned low, high, site;

    __device__ explicit Philox(const Chain& chain) : site(chain.site) {
        const unsigned long long key = *chain.seed;
        low = __shfl_sync(~0u, static_cast<unsigned>(key), 0);
        high = __shfl_sync(~0u, static_cast<unsigned>(key >> 32), 0);
    }

    __device__ uint4 operator()(unsigned group) const {
        uint4 c = {group, 0, site, 0};
#pragma unroll
        for (unsigned i = 0; i < 10; ++i) {
            const uint2 p = product(c.x, 0xD2511F53), q = product(c.z, 0xCD9E8D57);
            c = {q.y ^ c.y ^ (low + i * 0x9E3779B9u), q.x, p.y ^ c.w ^ (high + i * 0xBB67AE85u), p.x};
        }
        return c;
    }

  private:
    __device__ static uint2 product(unsigned a, unsigned b) {  // low and high word
        const uint64_t both = uint64_t{a} * b;
        return {static_cast<unsigned>(both), static_cast<unsigned>(both >> 32)};
    }
};

// What lane 4 g + t does with two blocks of each of the rows g and g + 8: it draws the random bits of row ``row`` from
// element 16 (t / 2) of each block on, and has the scale of block ``block`` of row ``row``.
struct Lane {
    int row, block;
    unsigned half;  // selects the 16 bits of that block and row from those of all four
    bool odd, upper;

    __device__ Lane() : row(lane_id() / 4 + 8 * (lane_id() % 2)), block(lane_id() / 2 % 2), odd(kept(lane_id() % 2)),
                        upper(kept(block)) {
        half = kept(0x1110 + 0x1111 * (2 * (lane_id() % 2) + 4 * block));
    }
};

// Of two lanes whose numbers differ in a bit, ``upper`` in one: to the lower one what both gave as ``first``, to the upper
// one what both gave as ``second``; the lower one's comes first.
__device__ inline uint2 exchanged(bool upper, unsigned first, unsigned second, int bit) {
    const unsigned other = __shfl_xor_sync(~0u, upper ? first : second, bit);
    return {upper ? other : first, upper ? second : other};
}

// Random bits of two blocks of rows g and g + 8: words[m][h] for the eight elements that a lane has of block m and row
// g + 8 h.
struct Random {
    uint2 words[2][2];

    // ``group``: that of the 16 elements of the first block that the lane draws for. Two lanes swap halves.
    __device__ Random(const Philox& draw, const Lane& lane, unsigned group) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const uint4 call = draw(group + 2 * m);
            const uint2 x = exchanged(lane.odd, call.x, call.z, 1), y = exchanged(lane.odd, call.y, call.w, 1);
            words[m][0] = {x.x, y.x}, words[m][1] = {x.y, y.y};
        }
    }
};

// Bits of ``a`` where the mask has them, else of ``b``, by one instruction.
__device__ inline unsigned choose(unsigned mask, unsigned a, unsigned b) {
    unsigned out;
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(out) : "r"(mask), "r"(a), "r"(b));
    return out;
}

__device__ inline unsigned halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
}

// The codes of the lane's elements of row g + 8 h, which ``step`` brings to magnitudes of 6 · 2^-14 at most: as float16
// those have 512 times the index of E2M1 as their bits, to which nine random ones are added. Elements 4 i + {0, 2} take a
// word's bits from 0 and 16 on, 4 i + {1, 3} from 7 and 23 on.
__device__ inline unsigned stochastic_codes(const float (&v)[4][4], int h, float step, uint2 random) {
    constexpr unsigned NINE = 0x01FF01FF;
    const auto pair = [&](int j, int i) { return halves(v[j][2 * h + i] * step, v[j + 1][2 * h + i] * step); };
    const unsigned a = pair(0, 0) + (random.x & NINE), c = pair(0, 1) + ((random.x & NINE << 7) >> 7);
    const unsigned b = pair(2, 0) + (random.y & NINE), d = pair(2, 1) + ((random.y & NINE << 7) >> 7);
    const unsigned even = __byte_perm(a, b, 0x7531), odd = __byte_perm(c, d, 0x7531);
    return choose(0x0F0F0F0F, choose(0x07070707, even >> 1, even >> 4), choose(0x70707070, odd << 3, odd));
}

// The exponents in fp32's bits of 1/√32 times the largest magnitudes that a lane has of rows g and g + 8: 16 bits each.
__device__ inline unsigned exponents(const float (&v)[4][4]) {
    unsigned bits[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float top[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) top[j] = fmaxf(fabsf(v[j][2 * h]), fabsf(v[j][2 * h + 1]));
        bits[h] = __float_as_uint(fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])) * ROOT);
    }
    return bits[0] >> 23 | (bits[1] >> 7 & 0x00FF0000);
}

// What a lane has of two blocks of rows g and g + 8: codes[m][h] of block m of row g + 8 h; the scale of the block that
// Lane says, and it again where the scale of a row depends on it, which is not so of zeros and NaN, else 0.
struct Quantized {
    unsigned codes[2][2];
    int scale, top;

    // All codes of the block and row that Lane says.
    __device__ uint4 whole(const Lane& lane) const {
        const uint2 a = exchanged(lane.odd, codes[0][0], codes[0][1], 1);
        const uint2 b = exchanged(lane.odd, codes[1][0], codes[1][1], 1);
        const uint2 c = exchanged(lane.upper, a.x, b.x, 2), d = exchanged(lane.upper, a.y, b.y, 2);
        return {c.x, d.x, c.y, d.y};
    }
};

// Codes and scales by the rule headroom of sums that stand for themselves times 2^-SHIFT. Below 2^-124 all is 0, and
// from 2^110 on the scale is NaN.
template <int SHIFT>
__device__ inline Quantized quantize(const Sums (&sums)[2], const Lane& lane, const Random& random) {
    constexpr int ZERO = 3 + SHIFT, END = 237 + SHIFT;  // the exponents from the first to this one are usual
    unsigned powers[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) powers[m] = exponents(sums[m].values);
#pragma unroll
    for (int m = 0; m < 2; ++m) powers[m] = __vmaxu2(powers[m], __shfl_xor_sync(~0u, powers[m], 1));
#pragma unroll
    for (int m = 0; m < 2; ++m) powers[m] = __vmaxu2(powers[m], __shfl_xor_sync(~0u, powers[m], 2));

    Quantized out;
    const int mine = __byte_perm(powers[0], powers[1], lane.half);
    out.scale = out.top = mine - SHIFT - 2;
    unsigned steps[2][2];
    const unsigned base = __float_as_uint(0.75f * ROOT) + (129 - 14 << 23);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        steps[m][0] = base - (powers[m] << 23);
        steps[m][1] = base - ((powers[m] & 0x00FF0000) << 7);
    }
    if (__any_sync(~0u, mine < ZERO || mine >= END)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int power = powers[i / 2] >> 16 * (i % 2) & 0xFFFF;
            if (power < ZERO || power >= END) steps[i / 2][i % 2] = 0;
        }
        if (mine < ZERO) out.scale = 127, out.top = 0;
        if (mine >= END) out.scale = 255, out.top = 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out.codes[i / 2][i % 2] = stochastic_codes(sums[i / 2].values, i % 2, __uint_as_float(steps[i / 2][i % 2]),
                                                   random.words[i / 2][i % 2]);
    }
    return out;
}

}  // namespace quartet
