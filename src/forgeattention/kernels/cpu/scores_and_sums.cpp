// qk_scores and value_sum: the two halves of attention by themselves.

#include <stdexcept>
#include <vector>

#include "half.h"
#include "ops.h"
#include "pages.h"
#include "queries.h"
#include "thread_pool.h"

namespace forge {
namespace {

constexpr int BLOCK = 64;  // rows of one piece of work

struct Block {
  int b, head, first, rows;
};
std::vector<Block> row_blocks(Shape shape, int kv_heads) {
  std::vector<Block> out;
  const int rows = shape.q_heads / kv_heads * shape.n;
  for (int b = 0; b < shape.batch; ++b)
    for (int head = 0; head < kv_heads; ++head)
      for (int first = 0; first < rows; first += BLOCK)
        out.push_back({b, head, first, rows - first < BLOCK ? rows - first : BLOCK});
  return out;
}

const uint8_t** all_records(const Codec& codec, const Table& table, int b, int head) {
  const int pages = (table.lengths[b] + PAGE - 1) / PAGE;
  auto** records = static_cast<const uint8_t**>(thread_scratch(2, (size_t(pages) + 1) * sizeof(void*)));
  row_records(codec, table, b, head, 0, pages, records);
  return records;
}

}  // namespace

void qk_scores(const Codec& codec, Shape shape, const Array4& q, const Table& table, float scale, float* out,
               int threads) {
  const Kernels& kernel = kernels();
  for (int b = 0; b < shape.batch; ++b) row_length("qk_scores", codec, table, b);
  const std::vector<Block> blocks = row_blocks(shape, codec.kv_heads);
  parallel_for(int64_t(blocks.size()), threads, [&](int64_t item) {
    const Block& block = blocks[item];
    const int dim = codec.dim, group = shape.q_heads / codec.kv_heads;
    auto* prepared = static_cast<uint8_t*>(thread_scratch(3, kernel.queries_bytes(dim, block.rows)));
    prepare_queries(codec, shape, q, block.b, block.head, block.first, block.rows, scale, prepared);
    const int length = table.lengths[block.b];
    const int64_t first =
        int64_t(block.b) * shape.q_heads * shape.n + int64_t(block.head) * group * shape.n + block.first;
    float* to = out + first * table.max_length;
    kernel.scores(codec, all_records(codec, table, block.b, block.head), length, 1, &prepared, block.rows, to,
                  table.max_length, nullptr, 0, thread_scratch(1, kernel.scratch_bytes(dim, 0)));
    for (int r = 0; r < block.rows; ++r)
      for (int t = length; t < table.max_length; ++t) to[int64_t(r) * table.max_length + t] = -INF;
  });
}

void value_sum(const Codec& codec, Shape shape, const float* p, const Table& table, float* out, int threads) {
  const Kernels& kernel = kernels();
  const int64_t stride = table.max_length, queries = int64_t(shape.q_heads) * shape.n;
  for (int b = 0; b < shape.batch; ++b) {
    const int length = row_length("value_sum", codec, table, b);
    for (int64_t r = 0; r < queries; ++r)
      for (int t = 0; t < length; ++t) {
        const float w = p[(b * queries + r) * stride + t];
        if (!(w - w == 0)) throw std::invalid_argument("[value_sum] expected finite weights; got NaN or infinity");
      }
  }
  const std::vector<Block> blocks = row_blocks(shape, codec.kv_heads);
  parallel_for(int64_t(blocks.size()), threads, [&](int64_t item) {
    const Block& block = blocks[item];
    const int dim = codec.dim, group = shape.q_heads / codec.kv_heads, length = table.lengths[block.b];
    const int64_t first = block.b * queries + int64_t(block.head) * group * shape.n + block.first;
    const uint8_t** records = all_records(codec, table, block.b, block.head);
    const size_t count = size_t(block.rows) * dim;
    float* o = static_cast<float*>(thread_scratch(0, 3 * count * sizeof(float)));
    float* part = static_cast<float*>(thread_scratch(3, (size_t(length) + 1) * block.rows * sizeof(float)));
    for (size_t i = 0; i < count; ++i) o[i] = 0;
    // The kernel takes non-negative weights: positive and negative parts apart.
    for (const float sign : {1.0f, -1.0f}) {
      bool any = false;
      for (int r = 0; r < block.rows; ++r)
        for (int t = 0; t < length; ++t) {
          const float w = sign * p[(first + r) * stride + t];
          part[size_t(r) * length + t] = w > 0 ? w : 0;
          any |= w > 0;
        }
      if (!any) continue;
      kernel.weigh(codec, records, length, part, length, block.rows, o + count,
                   thread_scratch(1, kernel.scratch_bytes(dim, block.rows)));
      for (size_t i = 0; i < count; ++i) o[i] += sign * o[count + i];
    }
    kernel.apply(codec.v_inverse, block.head, o, block.rows, o + count);
    const float* mu = codec.mu(codec.v_mu, block.head);
    for (int r = 0; r < block.rows; ++r) {
      double mass = 0;
      for (int t = 0; mu && t < length; ++t) mass += p[(first + r) * stride + t];
      for (int i = 0; i < codec.head_dim; ++i)
        out[(first + r) * codec.head_dim + i] = o[count + size_t(r) * dim + i] + (mu ? mu[i] * float(mass) : 0.0f);
    }
  });
}

}  // namespace forge
