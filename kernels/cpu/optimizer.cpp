// One optimizer step of many tensors, bit-equal to quartet.kernels.reference.optim.optimizers.
//
// A tile of B elements is decoded into arrays of floats, updated, and encoded again; the loops over them are plain
// enough for the compiler to vectorise. Compile with -ffp-contract=off: it is part of the numerics.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <omp.h>

namespace {

constexpr int MOST = 512;              // elements of a tile
constexpr int64_t CHUNK = 64;          // tiles that a thread takes at a time
constexpr int64_t PARALLEL_FROM = 64;  // tiles below which a second thread costs more than it saves
constexpr float SMALLEST = 0x1p-126f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT = std::numeric_limits<float>::quiet_NaN();

enum Element { FP32, BF16, FP16, E4M3, E5M2, SIGNED, UNSIGNED };
enum Mode { PLAIN, TENSOR, CURRENT, BLOCK, EXPANDED };
enum Algorithm { ADAM, LION, SGD };

struct Tensor {  // as kernels/cpu/optim.py lays it out in int64
  void *param, *grad, *codes[3], *scales[3];
  int64_t rows, tiles, width, site, first_group;
};

struct Kind {
  int32_t algorithm, nesterov, master, stochastic, share, tile, states, param, grad, element[3], mode[3];
};

// What the static tables of the reference hold.
struct Constants {
  float log2_p[6], exp2_q[4], powers[7], inverses[7], middle[2][8], log2_448, span, shift, top;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// ---- numbers ------------------------------------------------------------------------------------------------------

inline float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

inline float from_fp16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7FFF) << 13;
  const float small = float_of(magnitude + (113u << 23)) - 0x1p-14f;
  uint32_t bits = magnitude >= (31u << 23) ? magnitude + (224u << 23) : magnitude + (112u << 23);
  bits = magnitude < (1u << 23) ? bits_of(small) : bits;
  return float_of(bits | sign);
}

inline uint16_t to_fp16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;  // 0.5 has the spacing 2^-24
  uint32_t half = magnitude < (113u << 23) ? small : (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  half = magnitude >= 0x477FF000 ? 0x7C00 : half;
  half = magnitude > 0x7F800000 ? 0x7E00 : half;
  return half | sign;
}

template <int FRACTION, int LEAST> inline uint8_t to_fp8(float x) {
  constexpr int CUT = 23 - FRACTION;
  constexpr float MAX = FRACTION == 3 ? 448.f : 57344.f;
  const float magic = float_of((127 + 23 + LEAST - FRACTION) << 23);
  const uint32_t sign = (bits_of(x) >> 24) & 0x80;
  const bool nan = x != x;
  float a = std::fabs(x);
  a = a > MAX ? MAX : a;
  const uint32_t bits = bits_of(a);
  const uint32_t rounded = (bits + ((1u << (CUT - 1)) - 1) + ((bits >> CUT) & 1)) >> CUT;
  const uint32_t normal = rounded - ((127 + LEAST - 1) << FRACTION);
  const uint32_t small = bits_of(a + magic) - bits_of(magic);
  const uint32_t code = bits < (uint32_t)(127 + LEAST) << 23 ? small : normal;
  return (nan ? 0x7F : code) | sign;
}

inline float from_e5m2(uint8_t code) { return from_fp16((uint16_t)(code << 8)); }

inline float from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7F;
  const float x = float_of(magnitude << 20 | (uint32_t)(code & 0x80) << 24) * 0x1p120f;
  return magnitude == 0x7F ? NOT : x;
}

// ---- range expansion ----------------------------------------------------------------------------------------------

inline float log_2(float x, const Constants& k) {
  const uint32_t bits = bits_of(x), fraction = bits & 0x7FFFFF;
  const bool above = (fraction | 0x3F800000) >= 0x3FB504F3;
  const int32_t exponent = (int32_t)(bits >> 23) - 127 + above;
  const float f = float_of(fraction | (above ? 0x3F000000 : 0x3F800000)) - 1.f;
  float p = f * k.log2_p[5] + k.log2_p[4];
  for (int i = 3; i >= 0; --i) p = p * f + k.log2_p[i];
  return p * f + (float)exponent;
}

inline float exp_2(float x, const Constants& k) {
  x = x < -150.f ? -150.f : x;
  const float shifted = x + 0x1.8p23f, f = x - (shifted - 0x1.8p23f);
  float p = f * k.exp2_q[3] + k.exp2_q[2];
  for (int i = 1; i >= 0; --i) p = p * f + k.exp2_q[i];
  p = p * f + 1.f;
  const int32_t n = (int32_t)(bits_of(shifted) - 0x4B400000), half = n >> 1;
  return p * float_of((uint32_t)(half + 127) << 23) * float_of((uint32_t)(n - half + 127) << 23);
}

void expanded_encode(const float* x, int n, uint8_t* codes, float* scale, const Constants& k) {
  float a[MOST];
  uint32_t most = 0, few = 0x7F800000;
  for (int i = 0; i < n; ++i) {
    a[i] = std::fabs(x[i]);
    const uint32_t bits = bits_of(a[i]), counted = a[i] >= SMALLEST ? bits : 0x7F800000;
    most = bits > most ? bits : most;
    few = counted < few ? counted : few;
  }
  const float high = float_of(most), least = float_of(few);
  const bool flat = high < SMALLEST || !(least < high);
  const float top = high < SMALLEST ? SMALLEST : high, log_top = log_2(top < INFINITE ? top : 1.f, k);
  const float span = flat ? 1.f : log_top - log_2(flat ? 1.f : least, k);
  float power = std::floor(k.span / span) * 0.0625f;
  power = flat ? 1.f : power > 16.f ? 16.f : power < 0.0625f ? 0.0625f : power;
  for (int i = 0; i < n; ++i) {
    const float log = log_2(a[i] >= SMALLEST && a[i] < INFINITE ? a[i] : 1.f, k);
    float y = exp_2((log - log_top) * power + k.log2_448, k);
    y = a[i] >= SMALLEST ? y : 0.f;
    y = a[i] < INFINITE ? y : NOT;
    codes[i] = to_fp8<3, -6>(x[i] < 0.f ? -y : y);
  }
  scale[0] = top, scale[1] = power;
}

void expanded_decode(const uint8_t* codes, int n, const float* scale, float* x, const Constants& k) {
  const float inverse = 1.f / (scale[1] > 0.f ? scale[1] : 1.f);
  for (int i = 0; i < n; ++i) {
    const float value = from_e4m3(codes[i]), a = std::fabs(value);
    float y = exp_2((log_2(a > 0.f ? a : 1.f, k) - k.log2_448) * inverse, k);
    y = a > 0.f ? y : a;
    x[i] = (value < 0.f ? -y : y) * scale[0];
  }
}

// ---- the dynamic map ----------------------------------------------------------------------------------------------

inline float dynamic_decode(uint8_t code, bool with_sign, const Constants& k) {
  const int first = with_sign ? 0 : 1, j = with_sign ? std::abs((int)code - 127) : code == 0 ? 0 : code + 1;
  const float s = float_of((bits_of((float)j + 0.5f) & 0x7FFFFF) | 0x3F800000);
  float power = k.powers[0];
  for (int i = 1; i < 7; ++i) power = j >= 1 << (i + first) ? k.powers[i] : power;
  float value = (s * 0.9f - 0.8f) * power;
  value = j >= 128 << first ? 1.f : j == 0 ? 0.f : value;
  return with_sign && code < 127 ? -value : value;
}

inline uint8_t dynamic_encode(float x, bool with_sign, const Constants& k) {
  const int first = with_sign ? 0 : 1;
  const float *middle = k.middle[with_sign ? 0 : 1], a = std::fabs(x);
  float inverse = k.inverses[0];
  int cut = 23 - first;
  for (int i = 1; i < 7; ++i) {
    const bool above = a >= middle[i];
    inverse = above ? k.inverses[i] : inverse;
    cut = above ? 23 - i - first : cut;
  }
  float s = a * inverse + k.shift;
  s = s < 1.f ? 1.f : s > k.top ? k.top : s;
  int j = (int)(((bits_of(s) & 0x7FFFFF) | 0x800000) >> cut);
  j = a >= middle[7] ? 128 << first : a >= middle[0] ? j : 0;
  if (with_sign) return x < 0.f ? 127 - (j > 127 ? 127 : j) : 127 + j;
  return j > 0 ? j - 1 : 0;
}

// ---- tiles --------------------------------------------------------------------------------------------------------

void read(const void* from, int64_t at, int n, int element, float* x) {
  const uint16_t* h = (const uint16_t*)from + at;
  if (element == FP32) std::memcpy(x, (const float*)from + at, 4 * n);
  else if (element == BF16) for (int i = 0; i < n; ++i) x[i] = from_bf16(h[i]);
  else for (int i = 0; i < n; ++i) x[i] = from_fp16(h[i]);
}

void write(void* to, int64_t at, int n, int element, const float* x) {
  uint16_t* h = (uint16_t*)to + at;
  if (element == FP32) std::memcpy((float*)to + at, x, 4 * n);
  else if (element == BF16) for (int i = 0; i < n; ++i) h[i] = to_bf16(x[i]);
  else for (int i = 0; i < n; ++i) h[i] = to_fp16(x[i]);
}

struct Place {
  int64_t at;    // first element
  int64_t tile;  // of the tensor
  int n;         // elements
};

void decode(const Tensor& t, const Kind& kind, int s, const Place& place, float scale, float* x, const Constants& k) {
  const int element = kind.element[s], mode = kind.mode[s], n = place.n;
  if (mode == PLAIN) return read(t.codes[s], place.at, n, element, x);
  const float* scales = (const float*)t.scales[s];
  if (mode == BLOCK) scale = scales[place.tile];
  if (element == FP16) {
    read(t.codes[s], place.at, n, FP16, x);
    for (int i = 0; i < n; ++i) x[i] = x[i] * scale;
    return;
  }
  const uint8_t* codes = (const uint8_t*)t.codes[s] + place.at;
  if (mode == EXPANDED) expanded_decode(codes, n, scales + 2 * place.tile, x, k);
  else if (element == E4M3) for (int i = 0; i < n; ++i) x[i] = from_e4m3(codes[i]) * scale;
  else if (element == E5M2) for (int i = 0; i < n; ++i) x[i] = from_e5m2(codes[i]) * scale;
  else if (element == SIGNED) for (int i = 0; i < n; ++i) x[i] = dynamic_decode(codes[i], true, k) * scale;
  else for (int i = 0; i < n; ++i) x[i] = dynamic_decode(codes[i], false, k) * scale;
}

float largest(const float* x, int n) {
  uint32_t most = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7FFFFFFF;
    most = bits > most ? bits : most;
  }
  return float_of(most);
}

void encode(const Tensor& t, const Kind& kind, int s, const Place& place, float scale, const float* x,
            const Constants& k) {
  const int element = kind.element[s], mode = kind.mode[s], n = place.n;
  if (mode == PLAIN) return write(t.codes[s], place.at, n, element, x);
  uint8_t* codes = (uint8_t*)t.codes[s] + place.at;
  float* scales = (float*)t.scales[s];
  if (mode == EXPANDED) return expanded_encode(x, n, codes, scales + 2 * place.tile, k);
  if (mode == BLOCK) {
    scale = largest(x, n);
    if (element == E4M3) scale = scale / 448.f;
    if (element == E5M2) scale = scale / 57344.f;
    scale = scale < SMALLEST ? SMALLEST : scale;
    scales[place.tile] = scale;
  }
  const float inverse = 1.f / scale;
  float y[MOST];
  for (int i = 0; i < n; ++i) y[i] = x[i] * inverse;
  if (element == FP16) {
    for (int i = 0; i < n; ++i) y[i] = y[i] > 65504.f ? 65504.f : y[i] < -65504.f ? -65504.f : y[i];
    write(t.codes[s], place.at, n, FP16, y);
  } else if (element == E4M3) for (int i = 0; i < n; ++i) codes[i] = to_fp8<3, -6>(y[i]);
  else if (element == E5M2) for (int i = 0; i < n; ++i) codes[i] = to_fp8<2, -14>(y[i]);
  else if (element == SIGNED) for (int i = 0; i < n; ++i) codes[i] = dynamic_encode(y[i], true, k);
  else for (int i = 0; i < n; ++i) codes[i] = dynamic_encode(y[i], false, k);
}

// ---- rounding at random -------------------------------------------------------------------------------------------

void write_stochastic(void* to, const Place& place, const float* x, uint64_t seed, uint64_t group, uint32_t site,
                      uint32_t step) {
  uint16_t* h = (uint16_t*)to + place.at;
  for (int at = 0; at < place.n; at += 8, ++group) {
    uint32_t c[4] = {(uint32_t)group, (uint32_t)(group >> 32), site, step}, k0 = (uint32_t)seed, k1 = seed >> 32;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = (uint64_t)c[0] * 0xD2511F53u, p1 = (uint64_t)c[2] * 0xCD9E8D57u;
      c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, c[1] = (uint32_t)p1;
      c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1, c[3] = (uint32_t)p0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < 8 && at + j < place.n; ++j) {
      const float value = x[at + j];
      const uint32_t random = c[j >> 1] >> (16 * (j & 1)) & 0xFFFF;
      h[at + j] = value != value ? 0x7FC0 : (bits_of(value) + random) >> 16;
    }
  }
}

// ---- the step -----------------------------------------------------------------------------------------------------

float next_scale(const float* scale, int element, int mode) {
  const float amax = scale[1];
  if (!(amax > 0.f && amax < INFINITE)) return scale[0] > 0.f ? scale[0] : 1.f;
  float next;
  if (element == FP16) next = float_of((bits_of(amax) + 0x7FFFFF) & 0xFF800000) * 0x1p-14f;
  else next = amax / ((element == E4M3 ? 448.f : 57344.f) * (mode == TENSOR ? 0.5f : 1.f));
  return next < SMALLEST ? SMALLEST : next;
}

void raise(float* to, float value) {
  int32_t* bits = (int32_t*)to;
  const int32_t mine = (int32_t)bits_of(value);
  int32_t seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (seen < mine && !__atomic_compare_exchange_n(bits, &seen, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

struct Numbers {  // of one tensor
  float c[9], step, decode[3], encode[3];
  bool measured[3];
};

void tile(const Tensor& t, const Kind& kind, const Numbers& w, const Place& place, bool measure, uint64_t seed,
          float* tops, const Constants& k) {
  const int n = place.n, moments = kind.states - kind.master;
  const float* c = w.c;
  float p[MOST], g[MOST], old[3][MOST], made[3][MOST];
  for (int s = 0; s < kind.states; ++s) decode(t, kind, s, place, w.decode[s], old[s], k);
  if (kind.master) std::memcpy(p, old[moments], 4 * n);
  else read(t.param, place.at, n, kind.param, p);
  read(t.grad, place.at, n, kind.grad, g);
  for (int i = 0; i < n; ++i) g[i] = g[i] * c[0];
  if (kind.share) for (int i = 0; i < n; ++i) g[i] = g[i] + p[i] * c[2];
  const float *m = old[0], *v = old[1];
  if (kind.algorithm == ADAM) {
    for (int i = 0; i < n; ++i) made[0][i] = (g[i] - m[i]) * c[3] + m[i];
    for (int i = 0; i < n; ++i) made[1][i] = g[i] * c[5] * g[i] + v[i] * c[4];
  } else if (kind.algorithm == LION) {
    for (int i = 0; i < n; ++i) made[0][i] = (g[i] - m[i]) * c[4] + m[i];
  } else if (moments) {
    for (int i = 0; i < n; ++i) made[0][i] = m[i] * c[3] + g[i] * c[4];
  }
  if (!measure) {
    float x[MOST];
    for (int i = 0; i < n; ++i) x[i] = p[i] * c[1];
    if (kind.algorithm == ADAM) {
      for (int i = 0; i < n; ++i) x[i] = x[i] + made[0][i] * c[6] / (std::sqrt(made[1][i]) * c[7] + c[8]);
    } else if (kind.algorithm == LION) {
      for (int i = 0; i < n; ++i) {
        const float direction = (g[i] - m[i]) * c[3] + m[i];
        x[i] = x[i] + (direction > 0.f ? c[6] : direction < 0.f ? -c[6] : direction * 0.f);
      }
    } else if (!moments) {
      for (int i = 0; i < n; ++i) x[i] = x[i] + g[i] * c[6];
    } else if (kind.nesterov) {
      for (int i = 0; i < n; ++i) x[i] = x[i] + (made[0][i] * c[5] + g[i]) * c[6];
    } else {
      for (int i = 0; i < n; ++i) x[i] = x[i] + made[0][i] * c[6];
    }
    if (kind.master) std::memcpy(made[moments], x, 4 * n);
    for (int s = 0; s < kind.states; ++s) encode(t, kind, s, place, w.encode[s], made[s], k);
    if (kind.stochastic)
      write_stochastic(t.param, place, x, seed, t.first_group + place.tile * (kind.tile / 8), (uint32_t)t.site,
                       (uint32_t)w.step);
    else write(t.param, place.at, n, kind.param, x);
  }
  for (int s = 0; s < (measure ? moments : kind.states); ++s)
    if (kind.mode[s] == TENSOR || (measure && kind.mode[s] == CURRENT)) {
      const float top = largest(made[s], n);
      tops[s] = bits_of(top) > bits_of(tops[s]) ? top : tops[s];
    }
}

}  // namespace

// numbers: per tensor nine coefficients and the step. measure: only find the largest magnitudes that are not known.
extern "C" void quartet_optimizer(const Tensor* tensors, int64_t count, const float* numbers, const Kind* kind,
                                  const Constants* constants, uint64_t seed, int measure, int threads) {
  Numbers* all = new Numbers[count];
  int64_t* ends = new int64_t[count];
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    Numbers& w = all[i];
    std::memcpy(w.c, numbers + 10 * i, sizeof w.c);
    w.step = numbers[10 * i + 9];
    bool wanted = !measure;
    for (int s = 0; s < kind->states; ++s) {
      if (kind->mode[s] != TENSOR && kind->mode[s] != CURRENT) continue;
      float* scale = (float*)tensors[i].scales[s];
      w.decode[s] = scale[0];
      w.measured[s] = true;
      if (measure) {
        if (kind->mode[s] == CURRENT) scale[1] = 0.f;
        w.measured[s] = scale[1] == 0.f;
        wanted = wanted || w.measured[s];
      } else {
        w.encode[s] = scale[0] = next_scale(scale, kind->element[s], kind->mode[s]);
        scale[1] = 0.f;
      }
    }
    if (wanted) chunks += (tensors[i].rows * tensors[i].tiles + CHUNK - 1) / CHUNK;
    ends[i] = chunks;
  }
  threads = chunks * CHUNK < PARALLEL_FROM * 2 ? 1 : threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] > chunk) high = middle; else low = middle + 1;
    }
    const Tensor& t = tensors[low];
    const int64_t first = (chunk - (low ? ends[low - 1] : 0)) * CHUNK, total = t.rows * t.tiles;
    float tops[3] = {0.f, 0.f, 0.f};
    for (int64_t at = first; at < first + CHUNK && at < total; ++at) {
      const int64_t row = at / t.tiles, column = (at - row * t.tiles) * kind->tile;
      const int64_t left = t.width - column;
      const Place place = {row * t.width + column, at, (int)(left < kind->tile ? left : kind->tile)};
      tile(t, *kind, all[low], place, measure, seed, tops, *constants);
    }
    for (int s = 0; s < kind->states; ++s)
      if ((kind->mode[s] == TENSOR || (measure && kind->mode[s] == CURRENT)) && all[low].measured[s])
        raise((float*)tensors[low].scales[s] + 1, tops[s]);
  }
  delete[] all;
  delete[] ends;
}
