// The ops: what is split over threads, in what pieces, and how pieces are joined. Arguments have been checked for shape
// and type; what depends on values is checked here and reported as std::invalid_argument before anything is written.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace forge {

// A strided array [batch][heads][n][channels] of the caller, strides in elements, last axis contiguous.
struct Array4 {
  void* base;
  int64_t strides[3];
  int dtype;

  Vectors rows(int64_t b, int64_t h, int64_t first = 0) const {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    return {static_cast<uint8_t*>(base) + size * (b * strides[0] + h * strides[1] + first * strides[2]), strides[2],
            dtype};
  }
};

struct Table {
  const uint8_t* base;  // null: page_table holds addresses
  int64_t bytes;        // size of what base points to
  const int64_t* page_table;
  int64_t stride;  // of a row of page_table
  const int32_t* lengths;
  int max_length;
};

struct Exact {
  Array4 k, v;
  const int32_t* lengths;
  int max_length;
};

struct Shape {
  int batch, q_heads, n;
};

void encode(const Codec&, const Array4& k, const Array4& v, int64_t pages, uint8_t* out, int64_t out_bytes,
            const int64_t* offsets, int threads);
// out contiguous [pages][page_bytes]; a null base: offsets are addresses.
void compact(const uint8_t* base, int64_t bytes, const int64_t* offsets, int64_t pages, int64_t page_bytes,
             uint8_t* out, int threads);
// k, v contiguous [batch][kv_heads][max_length][head_dim, or dim if rotated].
// A head's tokens are `stride` tokens from the next one's.
void decode_pages(const Codec&, const Table&, int batch, bool rotated, int dtype, void* k, void* v, int64_t stride,
                  int threads);
// out contiguous [batch][q_heads][n][head_dim], lse [batch][q_heads][n]; table, exact, sinks may be null.
void decode_attention(const char* op, const Codec&, Shape, const Array4& q, const Table*, const Exact*, float scale,
                      bool causal, const float* sinks, int out_dtype, void* out, float* lse, int threads);
// out [batch][q_heads][n][max_length].
void qk_scores(const Codec&, Shape, const Array4& q, const Table&, float scale, float* out, int threads);
// p contiguous [batch][q_heads][n][max_length], out [batch][q_heads][n][head_dim].
void value_sum(const Codec&, Shape, const float* p, const Table&, float* out, int threads);

// Reads every byte once and returns a combination of them: what the benchmarks hold kernels against.
uint64_t read_pass(const uint8_t* data, int64_t bytes, int threads);

}  // namespace forge
