#include "isa_portable.h"
#include "instantiate.h"

namespace fa {

const Kernels& portable_kernels() { return make_kernels<Portable>("portable"); }

}  // namespace fa
