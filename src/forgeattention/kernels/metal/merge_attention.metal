// merge_attention: joins the splits of decode_attention by log-sum-exp. One thread per channel, query and head.
//
// Limited by the memory: a query of one head reads (splits + 4) x (D + 2) floats, 18.7 KB with 32 splits of head_dim
// 128, and writes 1 KB; 32 heads take 5 us at 120 GB/s (M4), a hundredth of what decode_attention reads at 64K tokens.
// Arithmetic: an exp2 and an FMA for each float read, 0.3e6 for 32 heads, 0.2 us of an M4's 1.9e12 a second.

#include "page.metal"

namespace forge {

// The weight of one split's unnormalised result, in units of the joint maximum.
template <class Parts>
inline float split_weight(Parts ml, long at, float top) {
  return ml[2 * at + 1] > 0.0f ? exp2(ml[2 * at] - top) : 0.0f;
}

// packed_o: [pairs, splits, rows, D], packed_ml: [.., 2]; exact_o: [pairs, 4, rows, DIM], exact_ml: [.., 2], m in
// log2 units; sinks: [q_heads] f32 logits, -inf for none. pairs = batch * kv_heads; rows = q_heads / kv_heads * n.
// out_packed: [pairs, rows, D] and out_exact: [pairs, rows, DIM] f32, the two addends of the result; mass: [pairs,
// rows] f32, the packed tokens' share of the softmax; lse: [pairs, rows] f32, natural log.
template <int D, int DIM, class PackedStats, class ExactStats, class Sinks>
inline void merge_attention(const device float* packed_o, PackedStats packed_ml, int splits,
                            const device float* exact_o, ExactStats exact_ml, Sinks sinks, int kv_heads, int rows,
                            int n, device float* out_packed, device float* out_exact, device float* mass,
                            device float* lse, uint3 position) {
  enum { EXACT = TILE_PAGES };
  const int channel = int(position.x), row = int(position.y), pair = int(position.z);
  const float sink = sinks[pair % kv_heads * (rows / n) + row / n] * M_LOG2E_F;
  const long packed = long(pair) * splits * rows + row, exact = long(pair) * EXACT * rows + row;
  float top = sink;
  for (int i = 0; i < splits; ++i) top = max(top, float(packed_ml[2 * (packed + i * rows)]));
  for (int i = 0; i < EXACT; ++i) top = max(top, float(exact_ml[2 * (exact + i * rows)]));
  float packed_total = 0.0f, exact_total = 0.0f, packed_sum = 0.0f, exact_sum = 0.0f;
  for (int i = 0; i < splits; ++i) {
    const long at = packed + i * rows;
    const float w = split_weight(packed_ml, at, top);
    if (w == 0.0f) continue;
    packed_total += w * packed_ml[2 * at + 1];
    packed_sum += w * packed_o[at * D + channel];
  }
  for (int i = 0; i < EXACT; ++i) {
    const long at = exact + i * rows;
    const float w = split_weight(exact_ml, at, top);
    if (w == 0.0f) continue;
    exact_total += w * exact_ml[2 * at + 1];
    if (channel < DIM) exact_sum += w * exact_o[at * DIM + channel];
  }
  const float total = packed_total + exact_total + (sink == -INFINITY ? 0.0f : exp2(sink - top));
  const float share = total > 0.0f ? 1.0f / total : 0.0f;
  const long at = long(pair) * rows + row;
  out_packed[at * D + channel] = packed_sum * share;
  if (channel < DIM) out_exact[at * DIM + channel] = exact_sum * share;
  if (channel == 0) {
    mass[at] = packed_total * share;
    lse[at] = total > 0.0f ? (top + log2(total)) * M_LN2_F : -INFINITY;
  }
}

}  // namespace forge

//! body
forge::merge_attention<D, DIM>(packed_o, packed_ml, packed_o_shape[2], exact_o, exact_ml, sinks, packed_o_shape[1],
                               packed_o_shape[3], N, out_packed, out_exact, mass, lse, thread_position_in_grid);
