// The table of kernels of one instruction set.
#pragma once

#include "attention.h"
#include "encode.h"
#include "exact_attention.h"
#include "transform.h"

namespace forge {

template <class Isa>
const Kernels& make_kernels(const char* name) {
  using A = Attention<Isa>;
  using T = Transform<Isa>;
  static const Kernels table = {
      name,
      A::queries_bytes,
      A::prepare,
      A::scratch_bytes,
      A::attend,
      A::scores,
      A::weigh,
      ExactAttention<Isa>::attend,
      A::decode,
      Encode<Isa>::encode,
      Encode<Isa>::scratch_bytes,
      T::apply,
      T::load_rows,
      T::store,
  };
  return table;
}

}  // namespace forge
