// What one instruction set offers: single-threaded kernels over the pages of one KV head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "shared/format.h"

namespace forge {

enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum ScaleRule { UNBIASED = 0, LEAST_SQUARES = 1, NORM = 2 };
enum { TILE_PAGES = 4, TILE = TILE_PAGES * PAGE, MAX_DIM = 512 };

// y = M x for one side of a layer, M [dim, dim] per head or one for all.
struct LinearMap {
  enum Kind { DENSE, HADAMARD, HADAMARD_INVERSE };
  Kind kind = DENSE;
  int dim = 0;
  int heads = 1;
  std::vector<float> columns;  // M transposed, [heads][dim][dim]
  std::vector<float> signs;    // [heads][dim]: M = H diag(signs), or diag(signs) H^T
};

struct Side {
  int bits, code;
  int8_t levels[16];
  float unit;
  int rule;
  int states() const { return code == SCALAR ? 1 : code == TRELLIS4 ? 4 : 8; }
  int level_count() const { return code == SCALAR ? 1 << bits : 1 << (bits + 1); }
};

// Feedback of one head: e^T H e = sum_i weight[i] (e_i + sum_(j<i) factor[i][j] e_j)^2 (codec/shaping.py), channels in
// the order in which trellis paths visit them.
struct Feedback {
  const float *factor, *weight;  // [orders][dim][dim], [orders][dim]; null for H the identity
};

// A codec as the kernels see it.
struct Codec {
  int head_dim, dim, kv_heads, scales;
  bool key_mean, refine;
  Side k, v;
  LinearMap k_forward, v_forward, k_inverse, v_inverse;
  LinearMap query;                // q' = A_k^-T q
  std::vector<float> k_mu, v_mu;  // [1 or kv_heads][dim], empty for none
  std::vector<float> k_factor;    // feedback of keys [1 or kv_heads][orders][dim][dim], empty for none
  std::vector<float> k_weight;    // its weights [1 or kv_heads][orders][dim]

  int record() const { return record_bytes(dim, k.bits, v.bits, scales); }
  int64_t page() const { return int64_t(record()) * kv_heads; }
  const float* mu(const std::vector<float>& m, int head) const {
    return m.empty() ? nullptr : m.data() + (int(m.size()) == dim ? 0 : size_t(head) * dim);
  }
};

// Vectors in the caller's memory: element (row, channel) at base + row * stride + channel, strides in elements.
struct Vectors {
  const void* base;
  int64_t stride;
  int dtype;
};

// Unnormalised attention over some tokens; maxima and sums are of base-2 exponentials.
struct Partial {
  float* o;    // [rows][dim]
  float* max;  // [rows], -inf if nothing was attended
  float* sum;  // [rows]
};

struct Kernels {
  const char* name;

  // Bytes of prepared queries, a multiple of 64.
  size_t (*queries_bytes)(int dim, int rows);
  // Puts q [dim], rotated, into a row of prepared queries; offset is added to every score, in base-2 units; scale is
  // the softmax scale times log2 e.
  void (*prepare_query)(const Codec&, const float* q, float offset, float scale, uint8_t* queries, int row);

  // Bytes of scratch for `rows` rows of the three functions below.
  size_t (*scratch_bytes)(int dim, int rows);
  // Attention over `tokens` tokens of `heads` neighbouring heads, each with prepared queries and a result of its own;
  // records are those of the first head, the others follow it. Pages are walked once, all heads of a few pages at a
  // time, so that memory is read as it lies. Scratch is for heads * rows. With `unpack`, each tile is unpacked once for
  // all rows of a head (worth it from about 16 rows).
  void (*attend)(const Codec&, const uint8_t* const* records, int tokens, int heads, uint8_t* const* queries, int rows,
                 bool unpack, const Partial* out, void* scratch);
  // Scores of `heads` neighbouring heads as in attend, in units of the queries' scale; those of row r of head h go to
  // out + stride * (h * rows + r). stats, unless null, takes of every page the largest score m and the sum of
  // exp(score - m), natural, pages of a row one after another, rows at a distance of stats_stride floats; m is -inf and
  // the sum NaN where scores are NaN.
  void (*scores)(const Codec&, const uint8_t* const* records, int tokens, int heads, uint8_t* const* queries, int rows,
                 float* out, int64_t stride, float* stats, int64_t stats_stride, void* scratch);
  // o [rows][dim] = sums of values (rotated) with non-negative weights, row r at weights + r * stride.
  void (*weigh)(const Codec&, const uint8_t* const* records, int tokens, const float* weights, int64_t stride, int rows,
                float* o, void* scratch);

  // Attention over exact tokens: q [rows][dim] float32; row r sees the first visible[r] of `tokens` tokens.
  void (*attend_exact)(int head_dim, int dim, const float* q, int rows, Vectors k, Vectors v, int tokens,
                       const int* visible, float scale, Partial out, void* scratch);

  // Decoded, still rotated keys and values [64][dim] of a record.
  void (*decode)(const Codec&, const uint8_t* record, float* k, float* v, void* scratch);
  // Record of rotated vectors k, v [64][dim] (overwritten). False if a scale does not fit the scale format.
  bool (*encode)(const Codec&, int head, float* k, float* v, uint8_t* record, void* scratch);
  size_t (*encode_scratch_bytes)(int dim);

  // y = M x for rows of dim floats.
  void (*apply)(const LinearMap&, int head, const float* x, int rows, float* y);
  // Conversions; load pads to `padded` channels with zeros and says whether all values are finite.
  bool (*load)(const Vectors&, int rows, int channels, int padded, float* out);
  void (*store)(const float* x, int64_t count, int dtype, void* out);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();
const Kernels& neon_kernels();

// The chosen instruction set (dispatch.cpp), those available here, best first, and a way to force one by name.
const Kernels& kernels();
std::vector<const Kernels*> available_kernels();
void use_kernels(const char* name);

}  // namespace forge
