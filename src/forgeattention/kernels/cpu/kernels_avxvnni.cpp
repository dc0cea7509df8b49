#include "isa_vnni.h"
#include "instantiate.h"

namespace fa {

const Kernels& avxvnni_kernels() { return make_kernels<AvxVnni>("avxvnni"); }

}  // namespace fa
