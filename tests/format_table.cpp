// Prints what kernels/shared/format.h says of the layout, for tests/test_packing.py.
#include <cstdio>
#include <initializer_list>

#include "shared/format.h"

template <int BITS, int CODE>
void unit(const unsigned (&words)[4]) {
  unsigned w[BITS], n[4];
  for (int k = 0; k < BITS; ++k) w[k] = words[k];
  forge::unit_nibbles<BITS, CODE>(w, n);
  std::printf("nibbles %d %d %u %u %u %u\n", BITS, CODE, n[0], n[1], n[2], n[3]);
}

int main() {
  for (int dim : {64, 96, 128, 256, 512}) {
    for (int scales : {forge::FP16, forge::LOG8})
      for (int k_bits = 2; k_bits <= 4; ++k_bits)
        for (int v_bits = 2; v_bits <= 4; ++v_bits)
          std::printf("record %d %d %d %d %d %d %d %d %d\n", dim, k_bits, v_bits, scales,
                      forge::k_scale_offset(dim, k_bits), forge::mean_offset(dim, k_bits, scales),
                      forge::v_offset(dim, k_bits, scales), forge::v_scale_offset(dim, k_bits, v_bits, scales),
                      forge::record_bytes(dim, k_bits, v_bits, scales));
    for (int lane = 0; lane < forge::LANES; ++lane)
      for (int u = 0; u < forge::units(dim); ++u) {
        std::printf("words %d %d %d %d %d %d\n", dim, lane, u, forge::word_index(dim, 2, lane, u, 1),
                    forge::word_index(dim, 3, lane, u, 2), forge::word_index(dim, 4, lane, u, 3));
        for (int n = 0; n < 4; ++n)
          for (int e = 0; e < 8; ++e)
            std::printf("code %d %d %d %d %d %d %d %d\n", dim, lane, u, 4 * e + n, forge::k_token(dim, lane, u, n),
                        forge::k_channel(dim, lane, u, n, e), forge::v_token(lane, n, e), forge::v_channel(lane, u, e));
      }
  }
  unsigned words[4];
  while (std::scanf("%u %u %u %u", words, words + 1, words + 2, words + 3) == 4) {
    unit<2, forge::SCALAR>(words), unit<2, forge::TRELLIS4>(words), unit<2, forge::TRELLIS8>(words);
    unit<3, forge::SCALAR>(words), unit<3, forge::TRELLIS4>(words), unit<3, forge::TRELLIS8>(words);
    unit<4, forge::SCALAR>(words);
  }
}
