#include "isa_vnni.h"
#include "instantiate.h"

namespace forge {

const Kernels& avxvnni_kernels() { return make_kernels<AvxVnni>("avxvnni"); }

}  // namespace forge
