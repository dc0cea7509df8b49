#include "isa_portable.h"
#include "instantiate.h"

namespace forge {

const Kernels& portable_kernels() { return make_kernels<Portable>("portable"); }

}  // namespace forge
