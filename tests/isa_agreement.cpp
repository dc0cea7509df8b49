// Every kernel of every instruction set of this processor against the portable one; prints what differs by how much and
// fails if too much does. Run for Arm under an emulator by test_isa_agreement.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/kernels.h"

using namespace forge;

namespace {

std::mt19937 generator(1);

std::vector<float> normal(size_t n) {
  std::normal_distribution<float> d;
  std::vector<float> x(n);
  for (float& f : x) f = d(generator);
  return x;
}

struct Block {
  void* p;
  explicit Block(size_t bytes) : p(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096)) { std::memset(p, 0, bytes); }
  ~Block() { std::free(p); }
};

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0, top = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    worst = std::fmax(worst, std::fabs(double(a[i]) - b[i]));
    top = std::fmax(top, std::fabs(double(b[i])));
  }
  return worst / top;
}

struct Results {
  std::vector<uint8_t> records;
  std::vector<float> k, v, scores, sums, packed, unpacked, exact;
};

constexpr int PAGES = 6, TOKENS = 330, ROWS = 7, EXACT = 70;

Results run(const Kernels& kernel, const Codec& c, const std::vector<uint8_t>* records, const std::vector<float>& x,
            const std::vector<float>& q, const std::vector<float>& exact) {
  const int dim = c.dim;
  const size_t count = size_t(PAGE) * dim;
  Results r;
  Block scratch(kernel.scratch_bytes(dim, ROWS) + kernel.encode_scratch_bytes(dim));
  r.records.resize(size_t(PAGES) * c.record());
  for (int p = 0; p < PAGES; ++p) {
    std::vector<float> k(x.begin() + 2 * p * count, x.begin() + (2 * p + 1) * count);
    std::vector<float> v(x.begin() + (2 * p + 1) * count, x.begin() + (2 * p + 2) * count);
    if (!kernel.encode(c, 0, k.data(), v.data(), r.records.data() + size_t(p) * c.record(), scratch.p)) std::abort();
  }
  const std::vector<uint8_t>& from = records ? *records : r.records;
  std::vector<const uint8_t*> pages;
  for (int p = 0; p < PAGES; ++p) pages.push_back(from.data() + size_t(p) * c.record());
  r.k.resize(count);
  r.v.resize(count);
  kernel.decode(c, pages[0], r.k.data(), r.v.data(), scratch.p);

  Block prepared(kernel.queries_bytes(dim, ROWS));
  for (int i = 0; i < ROWS; ++i)
    kernel.prepare_query(c, q.data() + i * dim, 0.5f, 0.13f, static_cast<uint8_t*>(prepared.p), i);
  auto* queries = static_cast<uint8_t*>(prepared.p);
  r.scores.resize(size_t(ROWS) * TOKENS);
  kernel.scores(c, pages.data(), TOKENS, queries, ROWS, r.scores.data(), TOKENS, scratch.p);
  std::vector<float> weights(size_t(ROWS) * TOKENS);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = std::fabs(x[i]);
  r.sums.resize(size_t(ROWS) * dim);
  kernel.weigh(c, pages.data(), TOKENS, weights.data(), TOKENS, ROWS, r.sums.data(), scratch.p);
  for (const bool unpack : {false, true}) {
    std::vector<float>& o = unpack ? r.unpacked : r.packed;
    o.resize(size_t(ROWS) * (dim + 2));
    const Partial out{o.data(), o.data() + ROWS * dim, o.data() + ROWS * (dim + 1)};
    kernel.attend(c, pages.data(), TOKENS, 1, &queries, ROWS, unpack, &out, scratch.p);
  }
  std::vector<uint16_t> half(exact.size());
  kernel.store(exact.data(), int64_t(exact.size()), FLOAT16, half.data());
  r.exact.resize(size_t(ROWS) * (dim + 2));
  int visible[ROWS];
  for (int i = 0; i < ROWS; ++i) visible[i] = EXACT - i;
  kernel.attend_exact(c.head_dim, dim, q.data(), ROWS, {half.data(), dim, FLOAT16},
                      {half.data() + EXACT * dim, dim, FLOAT16}, EXACT, visible, 0.13f,
                      {r.exact.data(), r.exact.data() + ROWS * dim, r.exact.data() + ROWS * (dim + 1)}, scratch.p);
  return r;
}

}  // namespace

int main(int argc, char** argv) {
  // Largest difference over the largest magnitude, and the share of record bytes that may differ.
  const double tolerance = argc > 1 ? std::atof(argv[1]) : 0, bytes = argc > 2 ? std::atof(argv[2]) : 0;
  int failures = 0;
  for (const Kernels* kernel : available_kernels()) {
    std::printf("%s\n", kernel->name);
    for (const int dim : {64, 96, 128, 256, 512})
      for (const int bits : {2, 3, 4})
        for (const int code : {SCALAR, TRELLIS4, TRELLIS8}) {
          if (bits == 4 && code != SCALAR) continue;
          Codec c{};
          c.head_dim = c.dim = dim;
          c.kv_heads = 1;
          c.scales = code == SCALAR ? FP16 : LOG8;
          c.key_mean = true;
          Side side{bits, code, {}, 0.02f, UNBIASED};
          for (int i = 0; i < side.level_count(); ++i)
            side.levels[i] = int8_t(std::lround(127.0 * (2 * i + 1 - side.level_count()) / (side.level_count() - 1)));
          c.k = c.v = side;
          const std::vector<float> x = normal(size_t(2 * PAGES * PAGE) * dim), q = normal(size_t(ROWS) * dim);
          const std::vector<float> exact = normal(size_t(2 * EXACT) * dim);
          const Results expected = run(portable_kernels(), c, nullptr, x, q, exact);
          const Results got = run(*kernel, c, &expected.records, x, q, exact);
          size_t differing = 0;
          for (size_t i = 0; i < got.records.size(); ++i) differing += got.records[i] != expected.records[i];
          const double share = double(differing) / double(got.records.size());
          const double worst[] = {difference(got.k, expected.k),           difference(got.v, expected.v),
                                  difference(got.scores, expected.scores), difference(got.sums, expected.sums),
                                  difference(got.packed, expected.packed), difference(got.unpacked, expected.unpacked),
                                  difference(got.exact, expected.exact)};
          bool good = share <= bytes;
          for (const double w : worst) good &= w <= tolerance;
          if (!good) {
            ++failures;
            std::printf(
                "  dim %d bits %d code %d: bytes %.4f decode %.1e %.1e scores %.1e sums %.1e attend %.1e %.1e exact %.1e\n",
                dim, bits, code, share, worst[0], worst[1], worst[2], worst[3], worst[4], worst[5], worst[6]);
          }
        }
  }
  return failures ? 1 : 0;
}
