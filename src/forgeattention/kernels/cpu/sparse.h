// Sparse attention: scores of all packed tokens, a threshold per query, values of the tokens that reach it.
#pragma once

#include "ops.h"

namespace forge {

// What sparse_scores made, contiguous.
struct Scored {
  Shape shape;
  int max_length;
  const float* scores;  // [batch][q_heads][n][max_length], -inf from each row's length on
  const float* stats;   // [batch][q_heads][n][pages][2]: largest score of a page, sum of exp(score - that)
};

void sparse_scores(const Codec&, Shape, const Array4& q, const Table&, float scale, float* scores, float* stats,
                   int threads);
// Scores of the pages' means: out [batch][q_heads][n][pages], -inf past a row's last page.
void page_scores(const Codec&, Shape, const Array4& q, const Table&, float scale, float* out, int threads);
// budgets [q_heads] or null for `budget` tokens of every query; or top_p > 0. exact_lse [batch][q_heads][n] or null.
// Results [batch][q_heads][n].
void sparse_threshold(const Scored&, const int* lengths, const int* budgets, int budget, float top_p,
                      const float* exact_lse, float* threshold, int* last, int* kept, float* dropped, float* top,
                      int threads);
// out [batch][q_heads][n][head_dim], lse [batch][q_heads][n].
void sparse_attention(const Codec&, const Scored&, const Table&, const float* threshold, const int* last,
                      const float* top, float* out, float* lse, int threads);

}  // namespace forge
