// Fused CPU kernels, bit-equal to quartet.kernels.reference.
//
// One tile is 16 rotation groups side by side: tile[j] holds element j of every group in 16 lanes, so the
// butterfly, the tree sums, the scale rules and the rounding are plain vertical vector arithmetic in exactly the
// reference's order. Loaders transpose the input into a tile, stores transpose the results out of it.
// Compile with -ffp-contract=off and without any fast-math flag: both are part of the numerics.

#include <cstdint>
#include <cstring>

#include <omp.h>
#if defined(__AVX512F__) && defined(__AVX512DQ__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "quartet's CPU kernels need a little-endian machine"
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
constexpr int MAX_GROUP = 128;
constexpr int64_t PARALLEL_FROM = 1 << 14;  // elements below which a second thread costs more than it saves

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint64_t L __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

INLINE F splat(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE U splat_u(uint32_t x) { return U{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE F as_float(U x) { return (F)x; }
INLINE I min_i(I a, I b) { return a < b ? a : b; }
INLINE I max_i(I a, I b) { return a > b ? a : b; }

template <class V> INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V> INLINE void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// Quarter q of v[c] becomes elements 4q + c of the four vectors.
INLINE void transpose4(F* v) {
  F a = SHUFFLE(v[0], v[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  F b = SHUFFLE(v[0], v[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  F c = SHUFFLE(v[2], v[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  F d = SHUFFLE(v[2], v[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  v[0] = SHUFFLE(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  v[1] = SHUFFLE(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  v[2] = SHUFFLE(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  v[3] = SHUFFLE(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

INLINE void transpose16(F* v) {
  F t[16];
#pragma GCC unroll 4
  for (int a = 0; a < 4; ++a) transpose4(v + 4 * a);
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    F a = v[c], b = v[4 + c], d = v[8 + c], e = v[12 + c];
    t[c] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[4 + c] = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    t[8 + c] = SHUFFLE(d, e, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[12 + c] = SHUFFLE(d, e, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c)
#pragma GCC unroll 16
    for (int odd = 0; odd < 2; ++odd) {
      F a = t[4 * odd + c], b = t[8 + 4 * odd + c];
      v[4 * odd + c] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      v[8 + 4 * odd + c] = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
}

// ---- storage types ------------------------------------------------------------------------------------------------

struct Float32 {
  typedef float type;
  INLINE F read(const float* p) { return load<F>(p); }
  INLINE void write(float* p, F v) { store(p, v); }
};

struct BFloat16 {
  typedef uint16_t type;
  INLINE F read(const uint16_t* p) { return as_float(__builtin_convertvector(load<H>(p), U) << 16); }
  INLINE void write(uint16_t* p, F v) {
    U bits = (U)v;
    U rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    store(p, __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? splat_u(0x7FC0) : rounded, H));
  }
};

struct Float16 {
  typedef uint16_t type;
  INLINE F read(const uint16_t* p) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps((__m256i)load<H>(p));
#else
    U h = __builtin_convertvector(load<H>(p), U), sign = (h & 0x8000) << 16, magnitude = (h & 0x7FFF) << 13;
    F subnormal = as_float(magnitude + (113u << 23)) - splat(0x1p-14f);
    U normal = magnitude + (112u << 23), infinite = magnitude + (224u << 23);
    U bits = magnitude >= (31u << 23) ? infinite : magnitude < (1u << 23) ? (U)subnormal : normal;
    return as_float(bits | sign);
#endif
  }
  INLINE void write(uint16_t* p, F v) {
#if defined(__AVX512F__)
    store(p, (H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    U bits = (U)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    U subnormal = (U)(as_float(magnitude) + splat(0.5f)) - 0x3F000000;  // 0.5 has the spacing 2^-24
    U normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    U half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477FF000 ? splat_u(0x7C00) : half;  // 65520 rounds to infinity
    half = magnitude > 0x7F800000 ? splat_u(0x7E00) : half;
    store(p, __builtin_convertvector(half | sign, H));
#endif
  }
};

// ---- e2m1 and e8m0 ------------------------------------------------------------------------------------------------

INLINE F e2m1_decode(U code) {
#if defined(__AVX512F__)
  const F table = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  return (F)_mm512_permutexvar_ps((__m512i)code, (__m512)table);
#else
  U index = code & 7;
  U bits = index > 1 ? (index << 22) + (126u << 23) : index * 0x3F000000u;
  return as_float(bits | ((code & 8) << 28));
#endif
}

INLINE F e8m0_decode(I byte) {
  I bits = byte == 0 ? I{} + (1 << 22) : byte << 23;
  return (F)(byte == 255 ? I{} + 0x7FC00000 : bits);
}

// The same for one byte, from a table.
struct Powers {
  float of[256];
  Powers() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t bits = byte == 0 ? 1u << 22 : byte == 255 ? 0x7FC00000u : byte << 23;
      std::memcpy(&of[byte], &bits, 4);
    }
  }
};
const Powers POWERS;

// 16 consecutive codes of one row: 8 bytes to 16 lanes.
INLINE U unpack16(const uint8_t* p) {
  const uint32_t a = load<uint32_t>(p), b = load<uint32_t>(p + 4);
  const U shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
  return (U{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b} >> shift) & 15;
}

// ---- Philox4x32-10 ------------------------------------------------------------------------------------------------

INLINE L multiply_low(L a, uint32_t m) {
#if defined(__AVX512F__)
  return (L)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#else
  return (a & 0xFFFFFFFFu) * (uint64_t)m;
#endif
}

// Eight calls in 64-bit lanes; the upper half of a lane is ignored on the way and cut at the end.
INLINE void philox(L c0, L c1, L c2, L c3, uint64_t seed, L* out) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    L p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
    c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
    c1 = p1, c3 = p0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// Lane l of words[w]: word w of the call for group `even/odd[l/2]`.
INLINE void random_words(L even, L odd, uint64_t seed, uint32_t site, U* words) {
  L a[4], b[4], site_lanes = L{} + (uint64_t)site;
  philox(even, even >> 32, site_lanes, L{}, seed, a);
  philox(odd, odd >> 32, site_lanes, L{}, seed, b);
  for (int w = 0; w < 4; ++w) words[w] = (U)((a[w] & 0xFFFFFFFFu) | (b[w] << 32));
}

// ---- Hadamard -----------------------------------------------------------------------------------------------------

template <int N> struct Butterfly {
  INLINE void run(F* v) {
#pragma GCC unroll 64
    for (int i = 0; i < N / 2; ++i) {
      F a = v[i], b = v[i + N / 2];
      v[i] = a + b, v[i + N / 2] = a - b;
    }
    Butterfly<N / 2>::run(v);
    Butterfly<N / 2>::run(v + N / 2);
  }
};
template <> struct Butterfly<1> {
  INLINE void run(F*) {}
};

// One transform of N consecutive tile rows: strides N/2..16 across the sixteens, then 8..1 within each.
template <int N> void hadamard(F* x, const float* before, const float* after) {
  constexpr int SIXTEENS = N / 16;
  constexpr float scale = N == 16 ? 0.25f : N == 32 ? 0.17677669529663688f : N == 64 ? 0.125f : 0.08838834764831845f;
  if (before)
    for (int i = 0; i < N; ++i) x[i] = x[i] * splat(before[i]);
  if (SIXTEENS > 1)
    for (int i = 0; i < 16; ++i) {
      F v[SIXTEENS];
#pragma GCC unroll 8
      for (int k = 0; k < SIXTEENS; ++k) v[k] = x[i + 16 * k];
      Butterfly<SIXTEENS>::run(v);
#pragma GCC unroll 8
      for (int k = 0; k < SIXTEENS; ++k) x[i + 16 * k] = v[k];
    }
  for (int k = 0; k < SIXTEENS; ++k) {
    F v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = x[16 * k + i];
    Butterfly<16>::run(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[16 * k + i] = v[i] * splat(scale);
  }
  if (after)
    for (int i = 0; i < N; ++i) x[i] = x[i] * splat(after[i]);
}

typedef void (*Hadamard)(F*, const float*, const float*);

Hadamard hadamard_of(int n) {
  switch (n) {
    case 16: return hadamard<16>;
    case 32: return hadamard<32>;
    case 64: return hadamard<64>;
    case 128: return hadamard<128>;
    default: return nullptr;
  }
}

// ---- block scales -------------------------------------------------------------------------------------------------

enum Rule { FLOOR, CEIL, HEADROOM, QUEST, EVEN };
enum Sigma { CENTRED, GUARDED, RMS };

struct Spec {
  int block, rule, sigma;
  bool nearest_power, stochastic, mask;
};

// block in bits 0-7, rule 8-10, sigma 11-12, power nearest 13, stochastic 14, mask 15
Spec spec_of(int32_t word) {
  return {word & 255, (word >> 8) & 7, (word >> 11) & 3, (word >> 13 & 1) != 0, (word >> 14 & 1) != 0,
          (word >> 15 & 1) != 0};
}

struct Sums {
  F sum, square;
};

// tree_sum: level M is v_M[i] = v_2M[i] + v_2M[i + M]; depth first, so few values live at a time.
template <int BLOCK, int I0, int M> struct Tree {
  INLINE Sums sums(const F* x, F down) {
    Sums a = Tree<BLOCK, I0, 2 * M>::sums(x, down), b = Tree<BLOCK, I0 + M, 2 * M>::sums(x, down);
    return {a.sum + b.sum, a.square + b.square};
  }
};
template <int BLOCK, int I0> struct Tree<BLOCK, I0, BLOCK> {
  INLINE Sums sums(const F* x, F down) {
    F v = x[I0] * down;
    return {v, v * v};
  }
};

INLINE I exponent_of(F x, I* mantissa) {
  I small = x < splat(0x1p-126f);
  I bits = (I)(small ? x * splat(0x1p64f) : x);
  *mantissa = bits & 0x7FFFFF;
  return (bits >> 23) - 127 - (small & 64);
}

template <int BLOCK> __attribute__((noinline)) I quest_byte(const F* x, F amax, const Spec& spec) {
  I huge = amax >= splat(0x1p60f);
  F down = huge ? splat(0x1p-96f) : splat(1.f), up = huge ? splat(0x1p96f) : splat(1.f);
  Sums sums = Tree<BLOCK, 0, 1>::sums(x, down);
  const F inverse = splat(1.f / BLOCK);
  F variance = sums.square * inverse;
  if (spec.sigma != RMS) {
    F mean = sums.sum * inverse;
    F least = spec.sigma == GUARDED ? variance * splat(1.f / 16) : splat(0.f);
    F centred = variance - mean * mean;
    variance = centred > least ? centred : least;
  }
  F deviation;
  for (int l = 0; l < LANES; ++l) deviation[l] = __builtin_sqrtf(variance[l]);
  I mantissa;
  I exponent = exponent_of(deviation * splat((float)(2.92247856 / 6.0)) * up + splat(1e-8f), &mantissa);
  return exponent + 127 + (spec.nearest_power ? (mantissa >= 0x3504F4) & 1 : I{});
}

template <int BLOCK> I scale_byte(const F* x, const Spec& spec) {
  I a = {}, b = {};
  for (int i = 0; i < BLOCK; i += 2) {
    a = max_i(a, (I)x[i] & 0x7FFFFFFF);
    b = max_i(b, (I)x[i + 1] & 0x7FFFFFFF);
  }
  a = max_i(a, b);  // as integers: a NaN is above infinity, which is above every number
  F amax = (F)a;
  I byte;
  if (spec.rule == QUEST) {
    byte = quest_byte<BLOCK>(x, amax, spec);
  } else {
    I mantissa;
    byte = exponent_of(amax, &mantissa) - 2 + 127;
    if (spec.rule == CEIL) byte += (mantissa > 0x400000) & 1;
    if (spec.rule == EVEN) byte += (mantissa >= 0x600000) & 1;
  }
  byte = min_i(max_i(byte, I{}), I{} + 254);
  byte = a == 0 ? I{} + 127 : byte;
  return a >= 0x7F800000 ? I{} + 255 : byte;
}

I scale_byte_of(const F* x, const Spec& spec) {
  switch (spec.block) {
    case 16: return scale_byte<16>(x, spec);
    case 32: return scale_byte<32>(x, spec);
    case 64: return scale_byte<64>(x, spec);
    default: return scale_byte<128>(x, spec);
  }
}

// ---- rounding -----------------------------------------------------------------------------------------------------

// The index of magnitudes up to 6 in units of 1/STEPS, ties to even, in the low 12 bits. A sum from 2^23 on is rounded
// to an integer, and is that integer in its low bits.
template <int STEPS> INLINE I index_of(F a) {
  const F near = a * splat(2.f * STEPS) + splat(0x1p23f), middle = a * splat((float)STEPS) + splat(0x1p23f + 2 * STEPS),
          far = a * splat(.5f * STEPS) + splat(0x1p23f + 4 * STEPS);
  return min_i(min_i((I)near, (I)middle), (I)far);  // positive floats are in the order of their bits
}

// Sixteen tile rows to two words of eight codes and one word of sixteen mask bits a lane; x becomes code · scale.
template <bool STOCHASTIC, bool MASK, bool VALUES>
INLINE void encode16(F* x, F reciprocal, F scale, I finite, const U* random, U* codes, U* mask) {
  U unclipped = {};
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    U word = {};
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const int k = 8 * half + j;
      I bits = (I)(x[k] * reciprocal), magnitude = bits & 0x7FFFFFFF;
      if (MASK) unclipped |= (U)(magnitude < 0x40C00000) & (1u << k);
      F a = (F)min_i(magnitude, I{} + 0x40C00000);
      I index;
      if (STOCHASTIC) {
        constexpr int windows[4] = {0, 7, 16, 23};
        I r = (I)((random[k / 4] >> windows[k % 4]) & 0x1FF);
        index = ((index_of<512>(a) + r) >> 9) & 7;
      } else {
        index = index_of<1>(a) & 7;
      }
      U code = (U)(index & finite) | (((U)bits >> 28) & 8);
      word |= code << (4 * j);
      if (VALUES) x[k] = e2m1_decode(code) * scale;
    }
    codes[half] = word;
  }
  *mask = unclipped;
}

template <bool STOCHASTIC, bool MASK, bool VALUES>
void encode(F* x, int sixteens, F reciprocal, F scale, I finite, L even, L odd, uint64_t seed, uint32_t site, U* codes,
            U* mask) {
  for (int c = 0; c < sixteens; ++c) {
    U random[4];
    if (STOCHASTIC) random_words(even + (uint64_t)c, odd + (uint64_t)c, seed, site, random);
    encode16<STOCHASTIC, MASK, VALUES>(x + 16 * c, reciprocal, scale, finite, random, codes + 2 * c, mask + c);
  }
}

typedef void (*Encode)(F*, int, F, F, I, L, L, uint64_t, uint32_t, U*, U*);

Encode encode_of(bool stochastic, bool mask, bool values) {
  static const Encode table[8] = {
      encode<false, false, false>, encode<false, false, true>, encode<false, true, false>, encode<false, true, true>,
      encode<true, false, false>,  encode<true, false, true>,  encode<true, true, false>,  encode<true, true, true>};
  return table[stochastic * 4 + mask * 2 + values];
}

// ---- tiles and loaders --------------------------------------------------------------------------------------------

// Lane l of a tile is unit `unit + l · step`; a unit is one group of one row, counted row by row. Lanes are
// consecutive groups (from row, col on, running into the next rows), or consecutive rows of one group.
struct Tile {
  int count;
  int64_t unit, step, row, col;
};

struct Grid {
  int64_t rows, cols;  // true sizes
  int group;
  int64_t units;    // groups a row, the last one padded
  bool down_lanes;  // lanes are consecutive rows (adjacent in memory), else consecutive groups

  static constexpr int64_t STRIP = 4;  // tiles side by side before the next group: whole cache lines, few pages

  int64_t row_tiles() const { return (rows + LANES - 1) / LANES; }
  int64_t tiles() const { return down_lanes ? units * row_tiles() : (rows * units + LANES - 1) / LANES; }

  Tile tile(int64_t t) const {
    if (down_lanes) {
      const int64_t strip = t / (units * STRIP), rest = t - strip * units * STRIP, left = row_tiles() - strip * STRIP;
      const int64_t wide = left < STRIP ? left : STRIP, index = rest / wide;
      const int64_t row = (strip * STRIP + rest - index * wide) * LANES;
      return {(int)(rows - row < LANES ? rows - row : LANES), row * units + index, units, row, index * group};
    }
    const int64_t unit = t * LANES, row = unit / units, left = rows * units - unit;
    return {(int)(left < LANES ? left : LANES), unit, 1, row, (unit - row * units) * group};
  }

  int width(int64_t col) const {
    const int64_t left = cols - col;
    return (int)(left < 0 ? 0 : left < group ? left : group);
  }

  // All 16 groups are of one row and need no padding.
  bool inside(const Tile& tile) const { return tile.count == LANES && tile.col + LANES * group <= cols; }

  // Row and first column of every lane of a tile whose lanes are consecutive groups; widths beyond `count` are 0.
  struct Places {
    int64_t row[LANES], col[LANES];
    int width[LANES];
  };
  Places places(const Tile& tile) const {
    Places at;
    int64_t row = tile.row, col = tile.col;
    for (int l = 0; l < LANES; ++l) {
      at.row[l] = row, at.col[l] = col, at.width[l] = l < tile.count ? width(col) : 0;
      col += group;
      if (col >= units * group) col = 0, ++row;
    }
    return at;
  }
};

struct Source {
  const void* data;
  int64_t row_stride, col_stride;  // elements; of packed codes: row_stride bytes
  const uint8_t* scales;
  int64_t scale_stride;
  int block_log2;
  float gain;
  void (*load)(const Source&, const Grid&, const Tile&, F*);
};

template <class T> void load_rows(const Source& s, const Grid& grid, const Tile& tile, F* out) {
  typedef typename T::type E;
  alignas(64) E spill[LANES][MAX_GROUP];
  const E* from[LANES];
  const int group = grid.group;
  if (s.col_stride == 1 && grid.inside(tile)) {
    for (int l = 0; l < LANES; ++l) from[l] = (const E*)s.data + tile.row * s.row_stride + tile.col + l * group;
  } else {
    const Grid::Places at = grid.places(tile);
    for (int l = 0; l < LANES; ++l) {
      const int width = at.width[l];
      const E* p = (const E*)s.data + (width ? at.row[l] * s.row_stride + at.col[l] * s.col_stride : 0);
      if (width == group && s.col_stride == 1) {
        from[l] = p;
      } else {
        for (int j = 0; j < width; ++j) spill[l][j] = p[j * s.col_stride];
        std::memset(spill[l] + width, 0, (size_t)(group - width) * sizeof(E));
        from[l] = spill[l];
      }
    }
  }
  for (int q = 0; q < group; q += 16) {
    F v[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) {
      v[l] = T::read(from[l] + q);
      __builtin_prefetch(from[l] + q + 2 * LANES * group);
    }
    transpose16(v);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) out[q + l] = v[l];
  }
}

template <class T> void load_columns(const Source& s, const Grid& grid, const Tile& tile, F* out) {
  typedef typename T::type E;
  const int width = grid.width(tile.col);
  const E* p = (const E*)s.data + tile.row + tile.col * s.col_stride;
  if (tile.count == LANES) {
    for (int j = 0; j < width; ++j, p += s.col_stride) {
      __builtin_prefetch(p + grid.group * s.col_stride);
      out[j] = T::read(p);
    }
  } else {
    for (int j = 0; j < width; ++j, p += s.col_stride) {
      E few[LANES] = {};
      std::memcpy(few, p, (size_t)tile.count * sizeof(E));
      out[j] = T::read(few);
    }
  }
  for (int j = width; j < grid.group; ++j) out[j] = F{};
}

INLINE void decode_lanes(U words, F scale, float gain, F* out) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) out[j] = e2m1_decode((words >> (4 * j)) & 15) * scale * splat(gain);
}

void load_packed_rows(const Source& s, const Grid& grid, const Tile& tile, F* out) {
  const int group = grid.group;
  alignas(64) int32_t byte[LANES];
  if (group >= 32 && grid.inside(tile)) {
    const uint8_t* p = (const uint8_t*)s.data + tile.row * s.row_stride + tile.col / 2;
    const uint8_t* scales = s.scales + tile.row * s.scale_stride;
    for (int c = 0; c < group; c += 32) {
      alignas(64) uint8_t runs[4][4][16];
      for (int l = 0; l < LANES; ++l) std::memcpy(runs[l % 4][l / 4], p + (l * group + c) / 2, 16);
      F v[4] = {load<F>(runs[0]), load<F>(runs[1]), load<F>(runs[2]), load<F>(runs[3])};
      transpose4(v);
      for (int half = 0; half < 2; ++half) {
        for (int l = 0; l < LANES; ++l) byte[l] = scales[(tile.col + l * group + c + 16 * half) >> s.block_log2];
        const F scale = e8m0_decode(load<I>(byte));
        decode_lanes((U)v[2 * half], scale, s.gain, out + c + 16 * half);
        decode_lanes((U)v[2 * half + 1], scale, s.gain, out + c + 16 * half + 8);
      }
    }
    return;
  }
  const Grid::Places at = grid.places(tile);
  for (int c = 0; c < group; c += 16) {
    alignas(64) uint32_t low[LANES] = {}, high[LANES] = {};
    for (int l = 0; l < LANES; ++l) {
      byte[l] = 127;
      if (c >= at.width[l]) continue;
      const uint8_t* p = (const uint8_t*)s.data + at.row[l] * s.row_stride + (at.col[l] + c) / 2;
      low[l] = load<uint32_t>(p), high[l] = load<uint32_t>(p + 4);
      byte[l] = s.scales[at.row[l] * s.scale_stride + ((at.col[l] + c) >> s.block_log2)];
    }
    const F scale = e8m0_decode(load<I>(byte));
    decode_lanes(load<U>(low), scale, s.gain, out + c);
    decode_lanes(load<U>(high), scale, s.gain, out + c + 8);
  }
}

void load_packed_columns(const Source& s, const Grid& grid, const Tile& tile, F* out) {
  const int width = grid.width(tile.col);
  const uint8_t* p = (const uint8_t*)s.data + tile.row / 2 + tile.col * s.row_stride;
  const uint8_t* scale = s.scales + (tile.row >> s.block_log2) + tile.col * s.scale_stride;
  for (int j = 0; j < width; ++j, p += s.row_stride, scale += s.scale_stride) {
    __builtin_prefetch(p + grid.group * s.row_stride);
    out[j] = e2m1_decode(unpack16(p)) * splat(POWERS.of[*scale]) * splat(s.gain);
  }
  for (int j = width; j < grid.group; ++j) out[j] = F{};
}

// ---- stores -------------------------------------------------------------------------------------------------------

// Tile rows back to 16 runs of `group` elements from offset[l] on, of which width[l] are kept (null: all, 16 lanes).
template <class T> void store_runs(F* x, int group, void* out, const int64_t* offset, const int* width) {
  typedef typename T::type E;
  for (int q = 0; q < group; q += 16) {
    F v[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) v[l] = x[q + l];
    transpose16(v);
    if (!width) {
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) {
        T::write((E*)out + offset[l] + q, v[l]);
        __builtin_prefetch((E*)out + offset[l] + q + group, 1);
      }
      continue;
    }
    E few[LANES][16];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) T::write(few[l], v[l]);
    for (int l = 0; l < LANES; ++l)
      if (q < width[l])
        std::memcpy((E*)out + offset[l] + q, few[l], (size_t)(width[l] - q < 16 ? width[l] - q : 16) * sizeof(E));
  }
}

typedef void (*StoreRuns)(F*, int, void*, const int64_t*, const int*);

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

StoreRuns store_of(int type) {
  return type == FLOAT32 ? store_runs<Float32> : type == BFLOAT16 ? store_runs<BFloat16> : store_runs<Float16>;
}

// `each` words of every lane, side by side, at the lane's unit.
void store_words(const U* words, int each, const Tile& tile, uint8_t* out) {
  uint8_t* p = out + tile.unit * each * 4;
  const int64_t step = tile.step * each * 4;
  if (each == 1 && tile.step == 1 && tile.count == LANES) return store(p, words[0]);
  if (each % 4 != 0) {
    for (int i = 0; i < each; ++i) {
      alignas(64) uint32_t word[LANES];
      store(word, words[i]);
      for (int l = 0; l < tile.count; ++l) store(p + l * step + 4 * i, word[l]);
    }
    return;
  }
  for (int i = 0; i < each; i += 4) {
    alignas(64) uint8_t runs[LANES][16];
    F v[4] = {(F)words[i], (F)words[i + 1], (F)words[i + 2], (F)words[i + 3]};
    transpose4(v);
    for (int c = 0; c < 4; ++c)
      for (int q = 0; q < 4; ++q) std::memcpy(runs[4 * q + c], (const uint8_t*)&v[c] + 16 * q, 16);
    for (int l = 0; l < tile.count; ++l) std::memcpy(p + l * step + 4 * i, runs[l], 16);
  }
}

// The low 8 or 16 bits of the words.
template <class Word> void store_narrow(const U* words, int each, const Tile& tile, uint8_t* out) {
  typedef Word V __attribute__((vector_size(LANES * sizeof(Word))));
  uint8_t* p = out + tile.unit * each * (int64_t)sizeof(Word);
  const int64_t step = tile.step * each * (int64_t)sizeof(Word);
  for (int i = 0; i < each; ++i) {
    alignas(64) Word narrow[LANES];
    const V v = __builtin_convertvector(words[i], V);
    if (each == 1 && tile.step == 1 && tile.count == LANES) return store(p, v);
    store(narrow, v);
    for (int l = 0; l < tile.count; ++l) store(p + l * step + i * (int64_t)sizeof(Word), narrow[l]);
  }
}

// ---- drivers ------------------------------------------------------------------------------------------------------

template <class Body> void parallel(int64_t count, int64_t elements, int threads, const Body& body) {
  if (threads > count) threads = (int)count;
  if (threads <= 1 || elements < PARALLEL_FROM) return body(0, count);
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
    body(count * t / n, count * (t + 1) / n);
  }
}

struct Outputs {
  uint8_t *codes, *scales, *mask;
  void* values;
  int type;
};

// Of a row's last group, what the block needs beyond the last rotation is +0, whatever the signs.
void clear_beyond(int64_t rotated, const Grid& grid, const Tile& tile, F* x) {
  Grid::Places at;
  if (!grid.down_lanes) at = grid.places(tile);
  for (int l = 0; l < tile.count; ++l)
    for (int64_t j = rotated - (grid.down_lanes ? tile.col : at.col[l]); j < grid.group; ++j) x[j][l] = 0.f;
}

void quantize(const Source& source, const Grid& grid, int n, const float* signs, const Spec& spec, uint64_t seed,
              uint32_t site, const Outputs& out, int threads) {
  const int group = grid.group, blocks = group / spec.block, sixteens = group / 16;
  const Hadamard rotate = hadamard_of(n);
  const StoreRuns store_values = store_of(out.type);
  const Encode encode_block = encode_of(spec.stochastic, spec.mask, out.values != nullptr);
  const int64_t rotated = n ? (grid.cols + n - 1) / n * n : grid.cols;
  parallel(grid.tiles(), grid.rows * grid.cols, threads, [&](int64_t begin, int64_t end) {
    F x[MAX_GROUP];
    U codes[MAX_GROUP / 8], scales[MAX_GROUP / 16], mask[MAX_GROUP / 16];
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = grid.tile(t);
      source.load(source, grid, tile, x);
      if (rotate) {
        for (int g = 0; g < group; g += n) rotate(x + g, signs, nullptr);
        if (signs && n < group) clear_beyond(rotated, grid, tile, x);
      }
      const L lane = {0, 2, 4, 6, 8, 10, 12, 14};
      const L even = ((uint64_t)tile.unit + lane * (uint64_t)tile.step) * (uint64_t)sixteens;
      const L odd = even + (uint64_t)(tile.step * sixteens);
      for (int b = 0; b < blocks; ++b) {
        const int c = b * spec.block / 16;
        F* block = x + 16 * c;
        const I byte = scale_byte_of(block, spec);
        const I finite = byte != 255;
        const F scale = e8m0_decode(byte), reciprocal = e8m0_decode(finite ? 254 - byte : byte);
        scales[b] = (U)byte;
        encode_block(block, spec.block / 16, spec.rule == HEADROOM ? reciprocal * splat(0.75f) : reciprocal, scale,
                     finite, even + (uint64_t)c, odd + (uint64_t)c, seed, site, codes + 2 * c, mask + c);
      }
      if (out.codes) {
        store_words(codes, group / 8, tile, out.codes);
        store_narrow<uint8_t>(scales, blocks, tile, out.scales);
      }
      if (out.mask && sixteens == 1) store_narrow<uint16_t>(mask, 1, tile, out.mask);
      if (out.mask && sixteens > 1) {
        for (int i = 0; i < sixteens / 2; ++i) mask[i] = mask[2 * i] | mask[2 * i + 1] << 16;
        store_words(mask, sixteens / 2, tile, out.mask);
      }
      if (out.values) {
        int64_t offset[LANES];
        int width[LANES];
        for (int l = 0; l < LANES; ++l)
          offset[l] = (tile.unit + l * tile.step) * group, width[l] = l < tile.count ? group : 0;
        store_values(x, group, out.values, offset, tile.count == LANES ? nullptr : width);
      }
    }
  });
}

template <class T>
void masked(const void* x, int64_t row_stride, int64_t rows, int64_t cols, float gain, const uint8_t* mask,
            int64_t mask_stride, void* out, int64_t keep, int type, int threads) {
  parallel(rows, rows * keep, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < keep; c += 16) {
        const int width = (int)(keep - c < 16 ? keep - c : 16);
        auto* p = (const typename T::type*)x + r * row_stride + c;
        typename T::type few[16] = {};
        if (c + 16 > cols) std::memcpy(few, p, (size_t)(cols - c) * sizeof few[0]), p = few;
        F v = T::read(p) * splat(gain);
        if (mask) {
          uint32_t bits = mask[r * mask_stride + c / 8];
          if (c + 8 < cols) bits |= (uint32_t)mask[r * mask_stride + c / 8 + 1] << 8;
          const U lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
          v = (F)((U)v & (U)((splat_u(bits) & lane) != 0));
        }
        const int64_t o = r * keep + c;
        if (width == 16) {
          if (type == FLOAT32) Float32::write((float*)out + o, v);
          else if (type == BFLOAT16) BFloat16::write((uint16_t*)out + o, v);
          else Float16::write((uint16_t*)out + o, v);
        } else if (type == FLOAT32) {
          std::memcpy((float*)out + o, &v, (size_t)width * 4);
        } else {
          uint16_t half[16];
          if (type == BFLOAT16) BFloat16::write(half, v);
          else Float16::write(half, v);
          std::memcpy((uint16_t*)out + o, half, (size_t)width * 2);
        }
      }
  });
}

void mask_rotate(const Source& source, const Grid& grid, int n, const float* signs, float gain, const uint8_t* mask,
                 int64_t mask_stride, void* out, int64_t keep, int type, int threads) {
  const Hadamard rotate = hadamard_of(n);
  const StoreRuns store_out = store_of(type);
  parallel(grid.tiles(), grid.rows * grid.cols, threads, [&](int64_t begin, int64_t end) {
    F x[MAX_GROUP];
    Grid::Places at;
    int width[LANES];
    int64_t offset[LANES];
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = grid.tile(t);
      const bool inside = grid.inside(tile) && tile.col + LANES * n <= keep;
      source.load(source, grid, tile, x);
      if (inside) {
        for (int l = 0; l < LANES; ++l) offset[l] = tile.row * keep + tile.col + l * n;
      } else {
        at = grid.places(tile);
        for (int l = 0; l < LANES; ++l) {
          const int64_t left = l < tile.count ? keep - at.col[l] : 0;
          width[l] = (int)(left < 0 ? 0 : left < n ? left : n);
          offset[l] = at.row[l] * keep + at.col[l];
        }
      }
      for (int c = 0; c < n; c += 16) {
        alignas(64) uint32_t word[LANES];
        if (inside && mask) {
          const uint8_t* p = mask + tile.row * mask_stride + (tile.col + c) / 8;
          for (int l = 0; l < LANES; ++l) word[l] = load<uint16_t>(p + l * n / 8);
        } else {
          for (int l = 0; l < LANES; ++l) {
            const int left = inside ? n : at.width[l] - c;
            word[l] = left <= 0 ? 0 : left < 16 ? (1u << left) - 1 : 0xFFFF;
            if (mask && left > 0) {
              const uint8_t* p = mask + at.row[l] * mask_stride + (at.col[l] + c) / 8;
              word[l] &= left > 8 ? load<uint16_t>(p) : *p;
            }
          }
        }
        const U bits = load<U>(word);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) x[c + j] = (F)((U)(x[c + j] * splat(gain)) & (U)((bits & (1u << j)) != 0));
      }
      rotate(x, nullptr, signs);
      store_out(x, n, out, offset, inside ? nullptr : width);
    }
  });
}

typedef void (*Loader)(const Source&, const Grid&, const Tile&, F*);

Loader loader_of(int type, bool columns) {
  if (columns)
    return type == FLOAT32 ? load_columns<Float32> : type == BFLOAT16 ? load_columns<BFloat16> : load_columns<Float16>;
  return type == FLOAT32 ? load_rows<Float32> : type == BFLOAT16 ? load_rows<BFloat16> : load_rows<Float16>;
}

// `dense`: rows follow each other without a gap. Then, if none is padded, they are one long row.
Grid grid_of(int64_t rows, int64_t cols, int n, int block, bool down_lanes, bool dense) {
  const int group = n > block ? n : block;
  if (dense && !down_lanes && cols % group == 0) cols *= rows, rows = 1;
  return {rows, cols, group, (cols + group - 1) / group, down_lanes};
}

}  // namespace

extern "C" {

// Element types: 0 float32, 1 bfloat16, 2 float16. `spec` is the word that spec_of reads; null outputs are skipped.

void quartet_rotate_quantize(const void* x, int type, int64_t row_stride, int64_t col_stride, int64_t rows,
                             int64_t cols, int n, const float* signs, int spec_word, const int64_t* seed,
                             uint32_t site, uint8_t* codes, uint8_t* scales, uint8_t* mask, void* values,
                             int values_type, int threads) {
  const Spec spec = spec_of(spec_word);
  const bool columns = row_stride == 1 && col_stride != 1 && rows > 1;
  const Source source = {x, row_stride, col_stride, nullptr, 0, 0, 1.f, loader_of(type, columns)};
  const bool dense = col_stride == 1 && row_stride == cols;
  quantize(source, grid_of(rows, cols, n, spec.block, columns, dense), n, signs, spec, seed ? (uint64_t)*seed : 0, site,
           {codes, scales, mask, values, values_type}, threads);
}

void quartet_requantize(const uint8_t* in_codes, const uint8_t* in_scales, int in_block, float gain, int64_t in_rows,
                        int64_t in_cols, int transpose, int n, const float* signs, int spec_word, const int64_t* seed,
                        uint32_t site, uint8_t* codes, uint8_t* scales, uint8_t* mask, void* values, int values_type,
                        int threads) {
  const Spec spec = spec_of(spec_word);
  const Source source = {in_codes, in_cols / 2, 1, in_scales, in_cols / in_block, __builtin_ctz((unsigned)in_block), gain,
                         transpose ? load_packed_columns : load_packed_rows};
  const Grid grid = transpose ? grid_of(in_cols, in_rows, n, spec.block, true, false)
                              : grid_of(in_rows, in_cols, n, spec.block, false, true);
  quantize(source, grid, n, signs, spec, seed ? (uint64_t)*seed : 0, site, {codes, scales, mask, values, values_type},
           threads);
}

void quartet_dequantize(const uint8_t* codes, const uint8_t* scales, int block, float gain, int64_t elements,
                        void* values, int type, int threads) {
  const int block_log2 = __builtin_ctz((unsigned)block);
  parallel(elements / 16, elements, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const F v = e2m1_decode(unpack16(codes + 8 * i)) * splat(POWERS.of[scales[16 * i >> block_log2]]) * splat(gain);
      if (type == FLOAT32) Float32::write((float*)values + 16 * i, v);
      else if (type == BFLOAT16) BFloat16::write((uint16_t*)values + 16 * i, v);
      else Float16::write((uint16_t*)values + 16 * i, v);
    }
  });
}

void quartet_mask_rotate(const void* x, int type, int64_t row_stride, int64_t rows, int64_t cols, float gain,
                         const uint8_t* mask, int64_t mask_stride, int n, const float* signs, void* out, int64_t keep,
                         int out_type, int threads) {
  if (n == 0) {
    auto run = type == FLOAT32 ? masked<Float32> : type == BFLOAT16 ? masked<BFloat16> : masked<Float16>;
    return run(x, row_stride, rows, cols, gain, mask, mask_stride, out, keep, out_type, threads);
  }
  const Source source = {x, row_stride, 1, nullptr, 0, 0, 1.f, loader_of(type, false)};
  const bool dense = row_stride == cols && keep == cols;
  const Grid grid = grid_of(rows, cols, n, 16, false, dense);
  mask_rotate(source, grid, n, signs, gain, mask, mask_stride, out, dense ? grid.cols : keep, out_type, threads);
}
}
