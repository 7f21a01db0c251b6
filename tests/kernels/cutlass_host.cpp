// CUTLASS's own scale-factor layouts, sub-byte iterator and host GEMM behind a C interface, for g++: the oracle that
// packing, swizzle and quantised products are compared with.
#include <cstdint>

#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/detail/sm103_blockscaled_layout.hpp"
#include "cutlass/float8.h"
#include "cutlass/float_subbyte.h"
#include "cutlass/util/reference/host/gett.hpp"
#include "cute/tensor.hpp"

namespace {

template <class Config>
void offsets(bool b, int rows, int k, int block, int64_t* out) {
  auto shape = cute::make_shape(rows, rows, k, 1);
  auto a_layout = Config::tile_atom_to_shape_SFA(shape);
  auto b_layout = Config::tile_atom_to_shape_SFB(shape);
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < k; column += block) *out++ = b ? b_layout(row, column, 0) : a_layout(row, column, 0);
}

template <int Block, class Element, class Scale>
void product(void const* a, void const* a_scales, void const* b, void const* b_scales, float alpha, int m, int n, int k,
          float* d) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<Block>;
  auto shape = cute::make_shape(m, n, k, 1);
  auto matrix = [&](void const* pointer, int rows) {
    return cute::make_tensor(cute::recast_ptr<Element>(const_cast<void*>(pointer)),
                             cute::make_layout(cute::make_shape(rows, k, 1),
                                               cute::make_stride(int64_t(k), cute::Int<1>{}, int64_t(0))));
  };
  auto scales = [](void const* pointer, auto layout) {
    return cute::make_tensor(static_cast<Scale const*>(pointer), layout);
  };
  auto A = matrix(a, m), B = matrix(b, n);
  auto SFA = scales(a_scales, Config::tile_atom_to_shape_SFA(shape));
  auto SFB = scales(b_scales, Config::tile_atom_to_shape_SFB(shape));
  auto D = cute::make_tensor(d, cute::make_layout(cute::make_shape(m, n, 1),
                                                  cute::make_stride(int64_t(n), cute::Int<1>{}, int64_t(0))));
  using namespace cutlass::reference::host;
  GettBlockScalingMainloopParams<float, decltype(A), decltype(SFA), decltype(B), decltype(SFB)> mainloop{A, SFA, B, SFB};
  GettBlockScalingEpilogueParams<float, float, float, decltype(D), decltype(D)> epilogue{alpha, 0.0f, D, D};
  Gemm3x(mainloop, epilogue);
}

}  // namespace

extern "C" {

// The scale offset of every (row, block) of a [rows, k] operand A or B; layout 100 or 103.
void host_offsets(int layout, int b, int block, int rows, int k, int64_t* out) {
  if (layout == 100 && block == 16) offsets<cutlass::detail::Sm1xxBlockScaledConfig<16>>(b, rows, k, 16, out);
  if (layout == 100 && block == 32) offsets<cutlass::detail::Sm1xxBlockScaledConfig<32>>(b, rows, k, 32, out);
  if (layout == 103 && block == 16) offsets<cutlass::detail::Sm103BlockScaledConfig<16>>(b, rows, k, 16, out);
  if (layout == 103 && block == 32) offsets<cutlass::detail::Sm103BlockScaledConfig<32>>(b, rows, k, 32, out);
}

// Values of packed E2M1 codes.
void host_decode(uint8_t const* packed, int count, float* out) {
  auto codes = cute::recast_ptr<cutlass::float_e2m1_t>(const_cast<uint8_t*>(packed));
  for (int i = 0; i < count; ++i) out[i] = float(cutlass::float_e2m1_t(codes[i]));
}

// D = alpha · A · Bᵀ in fp32; kind 0 mxf4, 1 nvf4, 2 mxf8.
void host_gemm(int kind, void const* a, void const* a_scales, void const* b, void const* b_scales, float alpha, int m,
               int n, int k, float* d) {
  using namespace cutlass;
  if (kind == 0) product<32, float_e2m1_t, float_ue8m0_t>(a, a_scales, b, b_scales, alpha, m, n, k, d);
  if (kind == 1) product<16, float_e2m1_t, float_ue4m3_t>(a, a_scales, b, b_scales, alpha, m, n, k, d);
  if (kind == 2) product<32, float_e4m3_t, float_ue8m0_t>(a, a_scales, b, b_scales, alpha, m, n, k, d);
}
}
