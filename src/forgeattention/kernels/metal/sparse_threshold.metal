// sparse_threshold: the exact threshold of each query, from all its scores: of its K largest ones, or of the fewest
// that carry a share of the softmax mass. Grid: one threadgroup of 256 threads per query.
//
// Scores are ordered as integers and the threshold is found four bits at a time: a pass counts (or weighs) the tokens
// of each of 16 digits, and the digit in which the wanted one lies is the next part of the threshold. A page whose
// maximum is under what is known of it is passed over without its scores. Counts and positions are floats: exact to
// 2^24 tokens. Where there are at least K pages, their maxima alone are searched first: the K-th largest of them bounds
// the threshold from below.
//
// It passes eight times over the scores of pages that may hold survivors, 4 bytes a token. No Mac has run this kernel:
// what limits it there is not known.

#include "page.metal"

namespace forge {

enum { SELECT_SIMDS = 8, SELECT_THREADS = 32 * SELECT_SIMDS, DIGITS = 16 };

// Floats as integers of the same order; 0 and -0 are one.
inline uint order_of(float s) {
  const uint bits = as_type<uint>(s + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
inline float score_of(uint key) { return as_type<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key); }

inline void add_digit(uint key, float weight, uint low, int shift, thread float* sums) {
  const uint digit = (key - low) >> shift;
  FORGE_UNROLL
  for (int d = 0; d < DIGITS; ++d) sums[d] += key >= low && digit == uint(d) ? weight : 0.0f;
}

// Joins all threads' sums and moves `low` to the digit in which `above` and what is larger reach `need`; `above`
// becomes what lies over that digit. Where rounding keeps it out of reach, the lowest digit that holds anything.
inline void choose_digit(thread float* sums, float need, int shift, thread uint& low, thread float& above,
                         threadgroup float* scratch, uint simdgroup, uint lane) {
  FORGE_UNROLL
  for (int d = 0; d < DIGITS; ++d) {
    const float sum = simd_sum(sums[d]);
    if (lane == 0) scratch[int(simdgroup) * DIGITS + d] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float over = above;
  int chosen = 0;
  bool found = false;
  for (int d = DIGITS - 1; d >= 0 && !found; --d) {
    float sum = 0.0f;
    for (int k = 0; k < SELECT_SIMDS; ++k) sum += scratch[k * DIGITS + d];
    if (sum == 0.0f) continue;
    chosen = d;
    above = over;
    over += sum;
    found = over >= need;
  }
  low += uint(chosen) << shift;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

inline float sum_of_threads(float x, threadgroup float* scratch, uint simdgroup, uint lane) {
  const float mine = simd_sum(x);
  if (lane == 0) scratch[simdgroup] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0.0f;
  for (int k = 0; k < SELECT_SIMDS; ++k) sum += scratch[k];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return sum;
}
inline float max_of_threads(float x, threadgroup float* scratch, uint simdgroup, uint lane) {
  const float mine = simd_max(x);
  if (lane == 0) scratch[simdgroup] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float most = scratch[0];
  for (int k = 1; k < SELECT_SIMDS; ++k) most = max(most, scratch[k]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return most;
}

// scores: [batch, q_heads, n, max_length] f32; pages: [batch, q_heads, n, all_pages, 2] f32, of each page the largest
// score and the sum of exp(score - largest); lengths: [batch] i32; top_k: [q_heads] i32; share: f32; exact_lse:
// [batch, q_heads, n] f32. All results [batch, q_heads, n]. `query` counts the queries of all rows.
template <bool BY_MASS, class Scores, class Pages, class Lengths, class Counts, class Exact>
inline void sparse_threshold(Scores scores, Pages pages, Lengths lengths, Counts top_k, float share, Exact exact_lse,
                             int q_heads, int n, int max_length, int all_pages, device float* score, device int* last,
                             device int* kept, device float* dropped, device float* top, threadgroup float* scratch,
                             long query, uint simdgroup, uint lane) {
  const int me = int(simdgroup * 32 + lane), length = lengths[query / (long(q_heads) * n)];
  const int page_count = (length + PAGE - 1) / PAGE;
  const Scores s = scores + query * max_length;
  const Pages page = pages + 2 * query * all_pages;

  float most = -INFINITY;
  for (int i = me; i < page_count; i += SELECT_THREADS) most = max(most, page[2 * i]);
  const float largest = max_of_threads(most, scratch, simdgroup, lane), exact = exact_lse[query];
  const float shift = finite_or_zero(max(largest, exact));
  float mass = 0.0f;
  for (int i = me; i < page_count; i += SELECT_THREADS) mass += page[2 * i + 1] * exp(page[2 * i] - shift);
  const float packed = sum_of_threads(mass, scratch, simdgroup, lane), exact_mass = exp(exact - shift);
  const float total = packed + exact_mass;
  const int wanted = BY_MASS ? 0 : min(int(top_k[query / n % q_heads]), length);
  const float need = BY_MASS ? share * total - exact_mass : float(wanted);
  if (length == 0 || need <= 0.0f) {
    if (me == 0) {
      score[query] = INFINITY;
      last[query] = -1;
      kept[query] = 0;
      dropped[query] = total > 0.0f ? packed / total : 0.0f;
      top[query] = largest;
    }
    return;
  }

  uint bound = 0, low = 0;
  float above = 0.0f;
  if (!BY_MASS && wanted <= page_count) {
    for (int bits = 28; bits >= 0; bits -= 4) {
      float sums[DIGITS] = {};
      for (int i = me; i < page_count; i += SELECT_THREADS) add_digit(order_of(page[2 * i]), 1.0f, bound, bits, sums);
      choose_digit(sums, need, bits, bound, above, scratch, simdgroup, lane);
    }
    above = 0.0f;
  }
  for (int bits = 28; bits >= 0; bits -= 4) {
    float sums[DIGITS] = {};
    for (int p = int(simdgroup); p < page_count; p += SELECT_SIMDS) {
      const uint least = max(low, bound);
      if (order_of(page[2 * p]) < least) continue;
      for (int h = 0; h < 2; ++h) {
        const int token = p * PAGE + 32 * h + int(lane);
        if (token >= length) continue;
        const float x = s[token];
        const uint key = order_of(x);
        if (key >= least) add_digit(key, BY_MASS ? exp(x - shift) : 1.0f, low, bits, sums);
      }
    }
    choose_digit(sums, need, bits, low, above, scratch, simdgroup, lane);
  }

  // Ties are counted in their order; what lies under the threshold is weighed.
  const float edge = score_of(low), weight = exp(edge - shift);
  const float ties = BY_MASS ? (weight > 0.0f ? max(1.0f, ceil((need - above) / weight)) : INFINITY) : need - above;
  float lost = 0.0f, over = 0.0f, seen = 0.0f;
  int position = -1;
  for (int first = 0; first < page_count; first += SELECT_SIMDS) {
    const int p = first + int(simdgroup);
    float tie[2] = {0.0f, 0.0f};
    if (p < page_count && order_of(page[2 * p]) < low) {
      if (lane == 0) lost += page[2 * p + 1] * exp(page[2 * p] - shift);
    } else if (p < page_count) {
      for (int h = 0; h < 2; ++h) {
        const int token = p * PAGE + 32 * h + int(lane);
        if (token >= length) continue;
        const float x = s[token];
        const uint key = order_of(x);
        tie[h] = key == low ? 1.0f : 0.0f;
        over += key > low ? 1.0f : 0.0f;
        lost += key < low ? exp(x - shift) : 0.0f;
      }
    }
    const float half_page = simd_sum(tie[0]), all = half_page + simd_sum(tie[1]);
    if (lane == 0) scratch[simdgroup] = all;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float before = seen;
    for (int k = 0; k < SELECT_SIMDS; ++k) {
      before += k < int(simdgroup) ? scratch[k] : 0.0f;
      seen += scratch[k];
    }
    const float rank[2] = {before + simd_prefix_inclusive_sum(tie[0]),
                           before + half_page + simd_prefix_inclusive_sum(tie[1])};
    for (int h = 0; h < 2; ++h)
      if (tie[h] != 0.0f && rank[h] <= ties) position = p * PAGE + 32 * h + int(lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  const float taken = min(ties, seen);
  const float all_over = sum_of_threads(over, scratch, simdgroup, lane);
  const float all_lost = sum_of_threads(lost, scratch, simdgroup, lane) + (seen - taken) * weight;
  const float at = max_of_threads(float(position), scratch, simdgroup, lane);
  if (me != 0) return;
  score[query] = edge;
  last[query] = int(at);
  kept[query] = int(all_over + taken);
  dropped[query] = all_lost / total;
  top[query] = largest;
}

}  // namespace forge

//! body
threadgroup float scratch[forge::SELECT_SIMDS * forge::DIGITS];
forge::sparse_threshold<BY_MASS>(scores, pages, lengths, top_k, share, exact_lse, scores_shape[1], scores_shape[2],
                                 scores_shape[3], pages_shape[3], score, last, kept, dropped, top, scratch,
                                 long(threadgroup_position_in_grid.x), simdgroup_index_in_threadgroup,
                                 thread_index_in_simdgroup);
