// decode_attention and prefill_attention.

#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "ops.h"
#include "pages.h"
#include "thread_pool.h"

namespace forge {
namespace {

constexpr float LN_2 = 0.6931471805599453f;
constexpr int BLOCK = 64;         // rows (queries of one KV head) that one piece of work holds
constexpr int UNPACK_ROWS = 16;   // from so many rows on, a tile is unpacked once for all
constexpr int EXACT_SPLIT = 256;  // exact tokens of one piece

// Pages of one piece, from the row's own length alone: results must not depend on batch or threads.
int pages_per_split(int pages) {
  const int even = (pages + 31) / 32, tiles = (even + TILE_PAGES - 1) / TILE_PAGES * TILE_PAGES;
  return tiles < 8 ? 8 : tiles > 64 ? 64 : tiles;
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Call {
  const char* op;
  const Codec& codec;
  const Kernels& kernel;
  Shape shape;
  const Array4& q;
  const Table* table;
  const Exact* exact;
  float scale;
  bool causal;
  const float* sinks;
  int out_dtype;
  void* out;
  float* lse;

  int group() const { return shape.q_heads / codec.kv_heads; }
  int rows() const { return group() * shape.n; }
  int exact_tokens(int b) const { return exact ? exact->lengths[b] : 0; }
  // Exact tokens that row r (head of the group, query) sees.
  int visible(int b, int r) const { return causal ? exact_tokens(b) - (shape.n - 1 - r % shape.n) : exact_tokens(b); }
};

// Queries of up to BLOCK rows of one KV head: q [rows][dim] as given and prepared for packed keys.
struct Queries {
  float* q;
  uint8_t* prepared;
  static size_t bytes(const Call& c, int rows) {
    return aligned(rows * c.codec.dim * sizeof(float)) + c.kernel.queries_bytes(c.codec.dim, rows);
  }
  Queries(const Call& c, int rows, void* block)
      : q(static_cast<float*>(block)),
        prepared(static_cast<uint8_t*>(block) + aligned(rows * c.codec.dim * sizeof(float))) {}

  void fill(const Call& c, int b, int head, int first, int rows) const {
    const int dim = c.codec.dim;
    for (int r = 0; r < rows; ++r) {
      const int row = first + r;
      c.kernel.load(c.q.rows(b, head * c.group() + row / c.shape.n, row % c.shape.n), 1, c.codec.head_dim, dim,
                    q + r * dim);
    }
    if (!c.table) return;
    float* rotated = static_cast<float*>(thread_scratch(0, size_t(rows) * dim * sizeof(float)));
    c.kernel.apply(c.codec.query, head, q, rows, rotated);
    const float* mu = c.codec.mu(c.codec.k_mu, head);
    for (int r = 0; r < rows; ++r) {
      double offset = 0;
      for (int i = 0; mu && i < dim; ++i) offset += double(q[r * dim + i]) * mu[i];
      const float scale = c.scale * LOG2_E;
      c.kernel.prepare_query(c.codec, rotated + r * dim, float(offset) * scale, scale, prepared, r);
    }
  }
};

size_t partial_bytes(const Call& c, int rows) { return aligned(size_t(rows) * (c.codec.dim + 2) * sizeof(float)); }
Partial partial_at(const Call& c, int rows, void* block) {
  float* p = static_cast<float*>(block);
  return {p, p + rows * c.codec.dim, p + rows * (c.codec.dim + 1)};
}

// Queries and results of `heads` heads from `head` on.
void attend_packed(const Call& c, int b, int head, int heads, int first_page, int tokens, uint8_t* const* queries,
                   int rows, const Partial* out) {
  const int pages = (tokens + PAGE - 1) / PAGE;
  auto** records = static_cast<const uint8_t**>(thread_scratch(2, (size_t(pages) + 1) * sizeof(void*)));
  row_records(c.codec, *c.table, b, head, first_page, pages, records);
  c.kernel.attend(c.codec, records, tokens, heads, queries, rows, rows >= UNPACK_ROWS, out,
                  thread_scratch(1, c.kernel.scratch_bytes(c.codec.dim, heads * rows)));
}

void attend_exact(const Call& c, int b, int head, int first_row, int first, int tokens, const Queries& q, int rows,
                  Partial out) {
  int visible[BLOCK];
  for (int r = 0; r < rows; ++r) visible[r] = c.visible(b, first_row + r) - first;
  c.kernel.attend_exact(c.codec.head_dim, c.codec.dim, q.q, rows, c.exact->k.rows(b, head, first),
                        c.exact->v.rows(b, head, first), tokens, visible, c.scale * LOG2_E, out,
                        thread_scratch(1, 64 * size_t(c.codec.head_dim) * sizeof(float)));
}

// Joins the pieces of a block of rows: the first `packed` hold rotated values.
void finish(const Call& c, int b, int head, int first_row, int rows, const std::vector<Partial>& parts, size_t packed) {
  const int dim = c.codec.dim;
  float* sums = static_cast<float*>(thread_scratch(0, (3 * size_t(rows) * dim + 2 * rows) * sizeof(float)));
  float *o_exact = sums + size_t(rows) * dim, *o = o_exact + size_t(rows) * dim, *mass = o + size_t(rows) * dim,
        *total = mass + rows;
  for (int r = 0; r < rows; ++r) {
    const int q_head = head * c.group() + (first_row + r) / c.shape.n;
    const float sink = c.sinks ? c.sinks[q_head] * LOG2_E : -INF;
    float top = sink;
    for (const Partial& p : parts) top = p.max[r] > top ? p.max[r] : top;
    total[r] = sink > -INF ? std::exp2(sink - top) : 0.0f;
    mass[r] = 0;
    for (int i = 0; i < dim; ++i) sums[r * dim + i] = o_exact[r * dim + i] = 0;
    for (size_t s = 0; s < parts.size(); ++s) {
      if (parts[s].max[r] == -INF) continue;
      const float w = std::exp2(parts[s].max[r] - top);
      const float* from = parts[s].o + r * dim;
      float* to = (s < packed ? sums : o_exact) + r * dim;
      for (int i = 0; i < dim; ++i) to[i] += w * from[i];
      total[r] += w * parts[s].sum[r];
      if (s < packed) mass[r] += w * parts[s].sum[r];
    }
    const int64_t at = (int64_t(b) * c.shape.q_heads + q_head) * c.shape.n + (first_row + r) % c.shape.n;
    c.lse[at] = total[r] == 0 ? -INF : (top + std::log2(total[r])) * LN_2;
  }
  if (packed) c.kernel.apply(c.codec.v_inverse, head, sums, rows, o);
  const float* mu = packed ? c.codec.mu(c.codec.v_mu, head) : nullptr;
  for (int r = 0; r < rows; ++r) {
    const int q_head = head * c.group() + (first_row + r) / c.shape.n;
    const int64_t at = (int64_t(b) * c.shape.q_heads + q_head) * c.shape.n + (first_row + r) % c.shape.n;
    const float scale = total[r] == 0 ? 0.0f : 1 / total[r];
    float* line = o_exact + r * dim;
    for (int i = 0; i < c.codec.head_dim; ++i) {
      if (packed) line[i] += o[r * dim + i];
      if (mu) line[i] += mu[i] * mass[r];
      line[i] *= scale;
    }
    const int64_t size = c.out_dtype == FLOAT32 ? 4 : 2;
    c.kernel.store(line, c.codec.head_dim, c.out_dtype, static_cast<uint8_t*>(c.out) + at * c.codec.head_dim * size);
  }
}

// Many rows: a piece of work is a block of rows over all tokens.
void attend_blocks(const Call& c, const std::vector<int>& lengths, int threads) {
  const int rows = c.rows(), blocks = (rows + BLOCK - 1) / BLOCK, per_block = (rows + blocks - 1) / blocks;
  parallel_for(int64_t(c.shape.batch) * c.codec.kv_heads * blocks, threads, [&](int64_t item) {
    const int block = int(item % blocks), head = int(item / blocks % c.codec.kv_heads),
              b = int(item / blocks / c.codec.kv_heads);
    const int first = block * per_block, n = rows - first < per_block ? rows - first : per_block;
    auto* memory = static_cast<uint8_t*>(thread_scratch(3, Queries::bytes(c, n) + 2 * partial_bytes(c, n)));
    Queries q(c, n, memory);
    q.fill(c, b, head, first, n);
    std::vector<Partial> parts;
    uint8_t* at = memory + Queries::bytes(c, n);
    if (lengths[b]) {
      parts.push_back(partial_at(c, n, at));
      attend_packed(c, b, head, 1, 0, lengths[b], &q.prepared, n, &parts.back());
    }
    const size_t packed = parts.size();
    if (c.exact_tokens(b)) {
      parts.push_back(partial_at(c, n, at + partial_bytes(c, n)));
      attend_exact(c, b, head, first, 0, c.exact_tokens(b), q, n, parts.back());
    }
    finish(c, b, head, first, n, parts, packed);
  });
}

// Few rows: a piece of work is a run of tokens, of exact ones for one KV head, of packed ones for several, whose
// records of a page lie side by side. The thread that ends the last piece of a head joins them.
void attend_splits(const Call& c, const std::vector<int>& lengths, int threads) {
  struct Piece {
    int b, head, heads, first, tokens;  // first page or first exact token
    size_t part;                        // of `head`; the next heads' follow at a distance of the row's parts
    bool packed;
  };
  struct Row {
    size_t parts, packed, all;  // first part of the row; parts of a head, the packed ones before the others
  };
  const int rows = c.rows(), kv_heads = c.codec.kv_heads;
  size_t runs = 0, parts = 0;
  std::vector<Row> table;
  for (int b = 0; b < c.shape.batch; ++b) {
    const int pages = (lengths[b] + PAGE - 1) / PAGE, run = pages_per_split(pages);
    const size_t packed = size_t(pages + run - 1) / run,
                 exact = size_t(c.exact_tokens(b) + EXACT_SPLIT - 1) / EXACT_SPLIT;
    table.push_back({parts, packed, packed + exact});
    runs += packed;
    parts += kv_heads * (packed + exact);
  }
  // Heads are shared out only as far as there are threads to feed: each head is computed by itself, whoever does it.
  const int heads = together(kv_heads, int64_t(runs), threads);
  std::vector<Piece> pieces;
  for (int b = 0; b < c.shape.batch; ++b) {
    const int run = pages_per_split((lengths[b] + PAGE - 1) / PAGE) * PAGE;
    size_t part = table[b].parts;
    for (int t = 0; t < lengths[b]; t += run, ++part)
      for (int head = 0; head < kv_heads; head += heads)
        pieces.push_back({b, head, kv_heads - head < heads ? kv_heads - head : heads, t / PAGE,
                          lengths[b] - t < run ? lengths[b] - t : run, part + head * table[b].all, true});
    for (int t = 0; t < c.exact_tokens(b); t += EXACT_SPLIT, ++part)
      for (int head = 0; head < kv_heads; ++head)
        pieces.push_back({b, head, 1, t, c.exact_tokens(b) - t < EXACT_SPLIT ? c.exact_tokens(b) - t : EXACT_SPLIT,
                          part + head * table[b].all, false});
  }
  const size_t jobs = size_t(c.shape.batch) * kv_heads, query_bytes = Queries::bytes(c, rows),
               part_bytes = partial_bytes(c, rows);
  auto* memory = static_cast<uint8_t*>(thread_scratch(3, jobs * query_bytes + parts * part_bytes));
  uint8_t* part_memory = memory + jobs * query_bytes;
  const auto queries = [&](int b, int head) {
    return Queries(c, rows, memory + (size_t(b) * kv_heads + head) * query_bytes);
  };
  const auto part = [&](size_t i) { return partial_at(c, rows, part_memory + i * part_bytes); };
  const std::unique_ptr<std::atomic<size_t>[]> left(new std::atomic<size_t>[jobs]);
  const auto join = [&](int b, int head) {
    std::vector<Partial> of_head;
    for (size_t i = 0; i < table[b].all; ++i) of_head.push_back(part(table[b].parts + head * table[b].all + i));
    finish(c, b, head, 0, rows, of_head, table[b].packed);
  };
  parallel_for(int64_t(jobs), threads, [&](int64_t i) {
    const int b = int(i / kv_heads), head = int(i % kv_heads);
    left[i].store(table[b].all, std::memory_order_relaxed);
    queries(b, head).fill(c, b, head, 0, rows);
    if (!table[b].all) join(b, head);
  });
  parallel_for(int64_t(pieces.size()), threads, [&](int64_t i) {
    const Piece& p = pieces[i];
    std::vector<uint8_t*> prepared;
    std::vector<Partial> out;
    for (int h = 0; h < p.heads; ++h) {
      prepared.push_back(queries(p.b, p.head + h).prepared);
      out.push_back(part(p.part + h * table[p.b].all));
    }
    if (p.packed)
      attend_packed(c, p.b, p.head, p.heads, p.first, p.tokens, prepared.data(), rows, out.data());
    else
      attend_exact(c, p.b, p.head, 0, p.first, p.tokens, queries(p.b, p.head), rows, out[0]);
    for (int h = 0; h < p.heads; ++h)
      if (left[size_t(p.b) * kv_heads + p.head + h].fetch_sub(1, std::memory_order_acq_rel) == 1) join(p.b, p.head + h);
  });
}

}  // namespace

void decode_attention(const char* op, const Codec& codec, Shape shape, const Array4& q, const Table* table,
                      const Exact* exact, float scale, bool causal, const float* sinks, int out_dtype, void* out,
                      float* lse, int threads) {
  const Call call{op, codec, kernels(), shape, q, table, exact, scale, causal, sinks, out_dtype, out, lse};
  std::vector<int> lengths(shape.batch, 0);
  for (int b = 0; b < shape.batch; ++b) {
    if (table) lengths[b] = row_length(op, codec, *table, b);
    if (exact && (exact->lengths[b] < 0 || exact->lengths[b] > exact->max_length))
      throw std::invalid_argument("[" + std::string(op) + "] expected exact lengths within max_length " +
                                  std::to_string(exact->max_length) + "; got " + std::to_string(exact->lengths[b]));
  }
  // Waking a thread takes about as long as so many keys of 64 channels.
  constexpr int64_t KEYS_PER_THREAD = 8192;
  int64_t work = 0;
  for (int b = 0; b < shape.batch; ++b) work += lengths[b] + call.exact_tokens(b);
  work = work * codec.kv_heads * codec.dim / 64 * ((call.rows() + 3) / 4);
  if (threads > 1 + work / KEYS_PER_THREAD) threads = int(1 + work / KEYS_PER_THREAD);
  if (call.rows() <= BLOCK)
    attend_splits(call, lengths, threads);
  else
    attend_blocks(call, lengths, threads);
}

}  // namespace forge
