// encode, compact and decode_pages.

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"
#include "pages.h"
#include "thread_pool.h"

namespace forge {

int row_length(const char* op, const Codec& codec, const Table& t, int row) {
  const int length = t.lengths[row];
  const auto complain = [&](const std::string& text) {
    throw std::invalid_argument("[" + std::string(op) + "] expected " + text);
  };
  if (length < 0 || length > t.max_length)
    complain("packed lengths within max_length " + std::to_string(t.max_length) + "; got " + std::to_string(length));
  if (t.base)
    for (int p = 0; p * PAGE < length; ++p) {
      const int64_t offset = t.page_table[row * t.stride + p];
      if (offset < 0 || offset + codec.page() > t.bytes)
        complain("page offsets within " + std::to_string(t.bytes) + " bytes; got " + std::to_string(offset));
    }
  return length;
}

void row_records(const Codec& codec, const Table& t, int row, int head, int first, int count, const uint8_t** out) {
  for (int p = 0; p < count; ++p) {
    const int64_t offset = t.page_table[row * t.stride + first + p];
    const uint8_t* page = t.base ? t.base + offset : reinterpret_cast<const uint8_t*>(offset);
    out[p] = page + int64_t(head) * codec.record();
  }
}

void encode(const Codec& codec, const Array4& k, const Array4& v, int64_t pages, uint8_t* out, int64_t out_bytes,
            const int64_t* offsets, int threads) {
  const Kernels& kernel = kernels();
  if (out)
    for (int64_t p = 0; p < pages; ++p)
      if (offsets[p] < 0 || offsets[p] + codec.page() > out_bytes)
        throw std::invalid_argument("[encode] expected offsets within " + std::to_string(out_bytes) + " bytes; got " +
                                    std::to_string(offsets[p]));
  // Records go to a buffer first, so that a page that cannot be coded leaves the caller's memory as it was.
  std::vector<uint8_t> buffer(size_t(pages) * codec.page());
  std::atomic<bool> k_finite{true}, v_finite{true}, fits{true};
  parallel_for(pages * codec.kv_heads, threads, [&](int64_t item) {
    const int64_t page = item / codec.kv_heads;
    const int head = int(item % codec.kv_heads), dim = codec.dim;
    const size_t count = size_t(PAGE) * dim;
    float* x = static_cast<float*>(thread_scratch(0, 3 * count * sizeof(float)));
    float *y_k = x + count, *y_v = y_k + count;
    const struct {
      const Array4& from;
      const LinearMap& map;
      const std::vector<float>& mu;
      float* y;
      std::atomic<bool>& finite;
    } sides[] = {{k, codec.k_forward, codec.k_mu, y_k, k_finite}, {v, codec.v_forward, codec.v_mu, y_v, v_finite}};
    for (const auto& side : sides) {
      if (!kernel.load(side.from.rows(0, head, page * PAGE), PAGE, codec.head_dim, dim, x)) {
        side.finite = false;
        return;
      }
      if (const float* mu = codec.mu(side.mu, head))
        for (size_t i = 0; i < count; ++i) x[i] -= mu[i % dim];
      kernel.apply(side.map, head, x, PAGE, side.y);
    }
    uint8_t* record = buffer.data() + page * codec.page() + int64_t(head) * codec.record();
    if (!kernel.encode(codec, head, y_k, y_v, record, thread_scratch(1, kernel.encode_scratch_bytes(dim))))
      fits = false;
  });
  if (!k_finite || !v_finite)
    throw std::invalid_argument(std::string("[encode] expected finite ") + (k_finite ? "v" : "k") +
                                "; got NaN or infinity");
  if (!fits)
    throw std::invalid_argument("[encode] expected vectors whose scales fit the scale format; got larger ones");
  parallel_for(pages, threads, [&](int64_t p) {
    uint8_t* to = out ? out + offsets[p] : reinterpret_cast<uint8_t*>(offsets[p]);
    std::memcpy(to, buffer.data() + p * codec.page(), size_t(codec.page()));
  });
}

void compact(const uint8_t* base, int64_t bytes, const int64_t* offsets, int64_t pages, int64_t page_bytes,
             uint8_t* out, int threads) {
  if (base)
    for (int64_t p = 0; p < pages; ++p)
      if (offsets[p] < 0 || offsets[p] + page_bytes > bytes)
        throw std::invalid_argument("[compact] expected pages within " + std::to_string(bytes) + " bytes; got " +
                                    std::to_string(offsets[p]));
  parallel_for(pages, threads, [&](int64_t p) {
    const uint8_t* from = base ? base + offsets[p] : reinterpret_cast<const uint8_t*>(offsets[p]);
    std::memcpy(out + p * page_bytes, from, size_t(page_bytes));
  });
}

void decode_pages(const Codec& codec, const Table& table, int batch, bool rotated, int dtype, void* k, void* v,
                  int64_t stride, int threads) {
  const Kernels& kernel = kernels();
  for (int b = 0; b < batch; ++b) row_length("decode_pages", codec, table, b);
  const int dim = codec.dim, width = rotated ? dim : codec.head_dim;
  const int pages = (table.max_length + PAGE - 1) / PAGE;
  const size_t size = dtype == FLOAT32 ? 4 : 2;
  parallel_for(int64_t(batch) * codec.kv_heads * pages, threads, [&](int64_t item) {
    const int page = int(item % pages), head = int(item / pages % codec.kv_heads),
              row = int(item / pages / codec.kv_heads);
    const size_t count = size_t(PAGE) * dim;
    float* y_k = static_cast<float*>(thread_scratch(0, 4 * count * sizeof(float)));
    float *y_v = y_k + count, *x = y_v + count, *line = x + count;
    const int left = table.lengths[row] - page * PAGE, valid = left < 0 ? 0 : left < PAGE ? left : int(PAGE);
    const int room = table.max_length - page * PAGE, rows = room < PAGE ? room : int(PAGE);
    if (valid) {
      const uint8_t* record;
      row_records(codec, table, row, head, page, 1, &record);
      kernel.decode(codec, record, y_k, y_v, thread_scratch(1, kernel.scratch_bytes(dim, 0)));
    }
    const int64_t first = (int64_t(row) * codec.kv_heads + head) * stride + page * PAGE;
    const struct {
      const LinearMap& map;
      const std::vector<float>& mu;
      const float* y;
      void* to;
    } sides[] = {{codec.k_inverse, codec.k_mu, y_k, k}, {codec.v_inverse, codec.v_mu, y_v, v}};
    for (const auto& side : sides) {
      if (!rotated && valid) kernel.apply(side.map, head, side.y, valid, x);
      const float* mu = rotated ? nullptr : codec.mu(side.mu, head);
      uint8_t* to = static_cast<uint8_t*>(side.to) + size_t(first) * width * size;
      for (int t = 0; t < valid; ++t, to += width * size) {
        const float* from = (rotated ? side.y : x) + size_t(t) * dim;
        for (int i = 0; mu && i < width; ++i) line[i] = from[i] + mu[i];
        kernel.store(mu ? line : from, width, dtype, to);
      }
      std::memset(to, 0, size_t(rows - valid) * width * size);
    }
  });
}

uint64_t read_pass(const uint8_t* data, int64_t bytes, int threads) {
  constexpr int64_t PART = 1 << 18;
  std::atomic<uint64_t> all{0};
  parallel_for((bytes + PART - 1) / PART, threads, [&](int64_t part) {
    const int64_t end = (part + 1) * PART < bytes ? (part + 1) * PART : bytes;
    uint64_t mixed[8] = {};
    for (int64_t i = part * PART; i + 64 <= end; i += 64) {
      uint64_t line[8];
      std::memcpy(line, data + i, 64);
      for (int j = 0; j < 8; ++j) mixed[j] ^= line[j];
    }
    uint64_t one = 0;
    for (const uint64_t m : mixed) one ^= m;
    all ^= one;
  });
  return all;
}

}  // namespace forge
