// sparse_attention: the second phase of sparse attention: softmax over the tokens that reach their row's threshold.
// A tile without survivors is left by its pages' maxima alone; of other tiles only pages and groups of 16 tokens with
// survivors are unpacked. Grid as in value_sum.
//
// What limits it: 32 bytes per row and tile of 256 tokens where nothing survives; else 4 bytes per row and token for
// the scores and the values of the pages that hold survivors (3,200 bytes each for head_dim 128 at 3 bits).

#include "value_sum.metal"

namespace forge {

// Weights exp2(score log2 e - top) of the survivors: scores above the threshold, and of those equal to it the ones
// up to token `last`. scores: [batch, q_heads, n, max_length] f32; pages: [batch, q_heads, n, page_count, 2] f32;
// threshold, last (i32), top (row maximum): [batch, q_heads, n].
template <class Scores, class Maxima, class Floats, class Ints>
struct Survivors {
  Scores scores;
  Maxima pages;
  Floats threshold;
  Ints last;
  Floats top;
  int max_length, page_count;
  bool tile_used(long row, int tile) const {
    const int first = tile * TILE_PAGES, end = min(first + TILE_PAGES, page_count);
    for (int page = first; page < end; ++page)
      if (pages[2 * (row * page_count + page)] >= threshold[row]) return true;
    return false;
  }
  float weight(long row, int token) const {
    const float s = scores[row * max_length + token];
    const bool survives = s > threshold[row] || (s == threshold[row] && token <= last[row]);
    return survives ? exp2((s - finite_or_zero(top[row])) * M_LOG2E_F) : 0.0f;
  }
};
template <class Scores, class Maxima, class Floats, class Ints>
inline Survivors<Scores, Maxima, Floats, Ints> survivors(Scores scores, Maxima pages, Floats threshold, Ints last,
                                                         Floats top, int max_length, int page_count) {
  Survivors<Scores, Maxima, Floats, Ints> s;
  s.scores = scores;
  s.pages = pages;
  s.threshold = threshold;
  s.last = last;
  s.top = top;
  s.max_length = max_length;
  s.page_count = page_count;
  return s;
}

}  // namespace forge

//! body
alignas(16) threadgroup float scratch[forge::value_scratch(D, ROWS)];
forge::value_sum<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, ROWS, true>(
    forge::survivors(scores, pages, threshold, last, top, scores_shape[3], pages_shape[3]), base, page_table, lengths,
    page_table_shape[1], v_levels, KV_HEADS, scores_shape[1] / KV_HEADS * scores_shape[2], sums, mass, scratch,
    threadgroup_position_in_grid, threadgroups_per_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
