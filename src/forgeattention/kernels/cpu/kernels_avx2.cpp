#include "isa_avx2.h"
#include "instantiate.h"

namespace forge {

const Kernels& avx2_kernels() { return make_kernels<Avx2>("avx2"); }

}  // namespace forge
