// The quantisers as functions of the CUDA driver, for clusters of 1 to 8 thread blocks; ops.py launches them with these
// parameters.

#include "both_axes.cuh"
#include "requantize.cuh"

using namespace quartet;

static_assert(sizeof(Shared) == 4864, "as ops.py has them");

#define QUANTIZERS(CLUSTER)                                                                                             \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(512) quantize_both_##CLUSTER(          \
        const __nv_bfloat16* x, const float* row_signs, const long long* row_seed, unsigned row_site,                   \
        const float* column_signs, const long long* column_seed, unsigned column_site, uint8_t* values,                 \
        float* row_scales, uint8_t* codes, uint8_t* scales, unsigned long long* inexact, int64_t stride, int rows,      \
        int cols, int width) {                                                                                          \
        quantize_both_axes({x, {row_signs, row_seed, row_site}, {column_signs, column_seed, column_site}, values,       \
                            row_scales, codes, scales, inexact, stride, rows, cols, width}, CLUSTER);                   \
    }                                                                                                                   \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(896) requantize_##CLUSTER(             \
        const uint8_t* codes, const uint8_t* scales, const float* signs, const long long* seed, unsigned site,          \
        uint8_t* turned, uint8_t* turned_scales, uint8_t* values, float* row_scales, unsigned long long* inexact,       \
        int rows, int cols, int height) {                                                                               \
        requantize_transpose({codes, scales, {signs, seed, site}, turned, turned_scales, values, row_scales, inexact,   \
                              rows, cols, height}, CLUSTER);                                                            \
    }

QUANTIZERS(1)
QUANTIZERS(2)
QUANTIZERS(4)
QUANTIZERS(8)
