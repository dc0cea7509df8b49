// GCC 12's own AVX-512 header trips this warning (its _mm512_undefined).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "isa_vnni.h"
#include "instantiate.h"

namespace forge {

const Kernels& avx512_kernels() { return make_kernels<Avx512>("avx512"); }

}  // namespace forge
