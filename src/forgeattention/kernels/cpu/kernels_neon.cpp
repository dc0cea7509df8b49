#include "isa_neon.h"
#include "instantiate.h"

namespace forge {

const Kernels& neon_kernels() { return make_kernels<Neon>("neon"); }

}  // namespace forge
