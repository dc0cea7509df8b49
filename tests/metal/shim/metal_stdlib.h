// The emulator's <metal_stdlib>: enough of Metal for the kernels of this package, on a CPU. The names at the bottom are
// those that MLX puts before every custom kernel (mlx/backend/metal/kernels/utils.h).
#define __METAL_VERSION__ 310

#include "math.h"
#include "simd.h"

using namespace metal;
using float16_t = half;
using bfloat16_t = bfloat;

// Address spaces of pointers and threadgroup variables are rewritten by emulator.py; what is left needs no keyword.
#define thread
#define constant const
#define kernel
#define double msl_has_no_double
