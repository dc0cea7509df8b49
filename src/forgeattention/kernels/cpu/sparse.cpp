// sparse_scores, sparse_threshold, sparse_attention.

#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "numbers.h"
#include "pages.h"
#include "thread_pool.h"

namespace fa {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int RUN = 64;  // pages of one piece of work: a multiple of a tile

typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));

int pages_of(int tokens) { return (tokens + PAGE - 1) / PAGE; }

// Weights exp(score - top) of a page's tokens that `keep`; their sum. `out` may be null.
float page_mass(const float* scores, int tokens, float top, float* out) {
  alignas(16) float x[PAGE];
  for (int i = 0; i < PAGE; ++i) x[i] = i < tokens ? (scores[i] - top) * LOG2_E : -INF;
  F32 sum = F32{};
  for (int i = 0; i < PAGE; i += 4) {
    const F32 e = exp2<F32, I32>(load<F32>(x + i));
    sum += e;
    if (out) put(out + i, e);
  }
  return sum_of(sum);
}

// What a query's threshold is looked for in: a token and its score, larger ones first, the earlier of equal ones first.
struct Candidate {
  float score;
  int position;
  bool operator<(const Candidate& other) const {
    return score > other.score || (score == other.score && position < other.position);
  }
};

// The largest page maximum under which no kept token can lie, so that only pages from it on need be looked at.
float lower_bound_k(const float* stats, int pages, int k, std::vector<float>& room) {
  if (k >= pages) return -INF;
  room.resize(pages);
  for (int p = 0; p < pages; ++p) room[p] = stats[2 * p];
  std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<float>());
  return room[k - 1];
}
// Mass below it is at most that of the pages wholly below it and 64 exp(bound) of every other page.
float lower_bound_p(const float* stats, int pages, float top, double may_drop, std::vector<Candidate>& room) {
  room.resize(pages);
  for (int p = 0; p < pages; ++p) room[p] = {stats[2 * p], p};
  std::sort(room.begin(), room.end());
  double below = 0;
  float bound = -INF;
  for (int i = pages - 1; i >= 0; --i) {
    const double weight = std::exp(double(room[i].score) - top);
    if (below + double(i + 1) * PAGE * weight > may_drop) break;
    bound = room[i].score;
    below += weight * stats[2 * room[i].position + 1];
  }
  return bound;
}

}  // namespace

void sparse_scores(const Codec& codec, Shape shape, const Array4& q, const Table& table, float scale, float* scores, float* stats,
                   int threads) {
  const Kernels& kernel = kernels();
  const int rows = shape.q_heads / codec.kv_heads * shape.n, dim = codec.dim, all_pages = pages_of(table.max_length);
  const int runs = (all_pages + RUN - 1) / RUN;
  for (int b = 0; b < shape.batch; ++b) row_length("sparse_scores", codec, table, b);
  parallel_for(int64_t(shape.batch) * codec.kv_heads * runs, threads, [&](int64_t item) {
    const int run = int(item % runs), head = int(item / runs % codec.kv_heads), b = int(item / runs / codec.kv_heads);
    const int first = run * RUN, length = table.lengths[b];
    const int end = std::min(first + RUN, all_pages), tokens = std::clamp(length - first * PAGE, 0, (end - first) * PAGE);
    const int64_t row0 = (int64_t(b) * codec.kv_heads + head) * rows;
    if (tokens) {
      auto* prepared = static_cast<uint8_t*>(thread_scratch(3, kernel.queries_bytes(dim, rows)));
      float* x = static_cast<float*>(thread_scratch(0, 2 * size_t(dim) * sizeof(float)));
      for (int r = 0; r < rows; ++r) {
        kernel.load(q.rows(b, head * (rows / shape.n) + r / shape.n, r % shape.n), 1, codec.head_dim, dim, x);
        kernel.apply(codec.query, head, x, 1, x + dim);
        const float* mu = codec.mu(codec.k_mu, head);
        double offset = 0;
        for (int i = 0; mu && i < dim; ++i) offset += double(x[i]) * mu[i];
        kernel.prepare_query(codec, x + dim, float(offset * scale), scale, prepared, r);
      }
      const int count = pages_of(tokens);
      auto** records = static_cast<const uint8_t**>(thread_scratch(2, size_t(count) * sizeof(void*)));
      row_records(codec, table, b, head, first, count, records);
      kernel.scores(codec, records, tokens, prepared, rows, scores + row0 * table.max_length + int64_t(first) * PAGE,
                    table.max_length, thread_scratch(1, kernel.scratch_bytes(dim, 0)));
    }
    for (int r = 0; r < rows; ++r) {
      float* line = scores + (row0 + r) * table.max_length;
      for (int t = std::max(length, first * PAGE); t < std::min(end * PAGE, table.max_length); ++t) line[t] = -INF;
      for (int p = first; p < end; ++p) {
        float* out = stats + ((row0 + r) * all_pages + p) * 2;
        const int valid = std::clamp(length - p * PAGE, 0, int(PAGE));
        float top = -INF;
        for (int t = 0; t < valid; ++t) top = std::max(top, line[p * PAGE + t]);
        out[0] = top;
        out[1] = valid ? page_mass(line + p * PAGE, valid, top, nullptr) : 0.0f;
      }
    }
  });
}

void page_scores(const Codec& codec, Shape shape, const Array4& q, const Table& table, float scale, float* out, int threads) {
  const Kernels& kernel = kernels();
  const int rows = shape.q_heads / codec.kv_heads * shape.n, dim = codec.dim, all_pages = pages_of(table.max_length);
  constexpr int MANY = 512;  // pages of one piece of work
  const int runs = (all_pages + MANY - 1) / MANY;
  for (int b = 0; b < shape.batch; ++b) row_length("page_scores", codec, table, b);
  parallel_for(int64_t(shape.batch) * codec.kv_heads * runs, threads, [&](int64_t item) {
    const int run = int(item % runs), head = int(item / runs % codec.kv_heads), b = int(item / runs / codec.kv_heads);
    const int first = run * MANY, end = std::min(first + MANY, all_pages), used = pages_of(table.lengths[b]);
    const int64_t row0 = (int64_t(b) * codec.kv_heads + head) * rows;
    float* x = static_cast<float*>(thread_scratch(0, size_t(rows + 1) * dim * sizeof(float)));
    float* shifts = static_cast<float*>(thread_scratch(1, size_t(rows) * sizeof(float)));
    for (int r = 0; r < rows; ++r) {
      float* given = x + size_t(rows) * dim;
      kernel.load(q.rows(b, head * (rows / shape.n) + r / shape.n, r % shape.n), 1, codec.head_dim, dim, given);
      kernel.apply(codec.query, head, given, 1, x + size_t(r) * dim);
      const float* mu = codec.mu(codec.k_mu, head);
      double offset = 0;
      for (int i = 0; mu && i < dim; ++i) offset += double(given[i]) * mu[i];
      shifts[r] = float(offset * scale);
    }
    for (int p = first; p < end; ++p) {
      alignas(16) float mean[MAX_DIM];
      float step = 0;
      if (p < used) {
        const uint8_t* record;
        row_records(codec, table, b, head, p, 1, &record);
        const uint8_t* line = record + mean_offset(dim, codec.k.bits, codec.scales);
        step = read_header(line).mean_step * scale;
        for (int i = 0; i < dim; ++i) mean[i] = float(reinterpret_cast<const int8_t*>(line)[i]);
      }
      for (int r = 0; r < rows; ++r) {
        F32 sum = F32{};
        if (p < used)
          for (int i = 0; i < dim; i += 4) sum += load<F32>(x + size_t(r) * dim + i) * load<F32>(mean + i);
        out[(row0 + r) * all_pages + p] = p < used ? sum_of(sum) * step + shifts[r] : -INF;
      }
    }
  });
}

void sparse_threshold(const Scored& s, const int* lengths, const int* budgets, int budget, float top_p, const float* exact_lse,
                      float* threshold, int* last, int* kept, float* dropped, float* tops, int threads) {
  const int pages = pages_of(s.max_length);
  for (int b = 0; b < s.shape.batch; ++b)
    if (lengths[b] < 0 || lengths[b] > s.max_length)
      throw std::invalid_argument("[sparse_threshold] expected packed lengths within max_length; got another one");
  const int per_row = s.shape.q_heads * s.shape.n;
  parallel_for(int64_t(s.shape.batch) * per_row, threads, [&](int64_t row) {
    const int b = int(row / per_row), head = int(row % per_row / s.shape.n), length = lengths[b], used = pages_of(length);
    const float* line = s.scores + row * s.max_length;
    const float* stats = s.stats + row * pages * 2;
    float top = -INF;
    for (int p = 0; p < used; ++p) top = std::max(top, stats[2 * p]);
    double packed = 0;
    for (int p = 0; p < used; ++p)
      packed += double(stats[2 * p + 1]) * std::exp(double(stats[2 * p]) - top);
    const double exact = exact_lse && exact_lse[row] > -INF ? std::exp(double(exact_lse[row]) - top) : 0, total = packed + exact;
    threshold[row] = packed == packed ? INF : __builtin_nanf("");  // a query that is not finite gives NaN
    last[row] = -1;
    kept[row] = 0;
    tops[row] = top;
    dropped[row] = length ? (exact < INF ? float(packed / total) : 0.0f) : 0.0f;
    const int k = std::min(budgets ? budgets[head] : budget, length);
    const double may_drop = top_p > 0 ? (1 - double(top_p)) * total : 0;
    if (length == 0 || packed != packed || (top_p > 0 ? packed <= may_drop : k <= 0)) return;

    static thread_local std::vector<float> maxima;
    static thread_local std::vector<Candidate> candidates;
    const float bound = top_p > 0 ? lower_bound_p(stats, used, top, may_drop, candidates) : lower_bound_k(stats, used, k, maxima);
    candidates.clear();
    for (int p = 0; p < used; ++p)
      if (stats[2 * p] >= bound)
        for (int t = p * PAGE; t < std::min((p + 1) * PAGE, length); ++t)
          if (line[t] >= bound) candidates.push_back({line[t], t});
    int count = k;
    if (top_p > 0) {
      std::sort(candidates.begin(), candidates.end());
      double left = packed;
      for (count = 0; count < int(candidates.size()) && left > may_drop; ++count)
        left -= std::exp(double(candidates[count].score) - top);
    } else if (count < int(candidates.size())) {
      std::nth_element(candidates.begin(), candidates.begin() + (count - 1), candidates.end());
    }
    double held = 0;
    Candidate lowest{INF, -1};
    for (int i = 0; i < count; ++i) {
      held += std::exp(double(candidates[i].score) - top);
      if (lowest < candidates[i] || lowest.position < 0) lowest = candidates[i];
    }
    threshold[row] = lowest.score;
    last[row] = lowest.position;
    kept[row] = count;
    dropped[row] = exact < INF ? float(std::max(0.0, packed - held) / total) : 0.0f;
  });
}

void sparse_attention(const Codec& codec, const Scored& s, const Table& table, const float* threshold, const int* last, const float* top,
                      float* out, float* lse, int threads) {
  const Kernels& kernel = kernels();
  const int rows = s.shape.q_heads / codec.kv_heads * s.shape.n, dim = codec.dim, pages = pages_of(s.max_length);
  const int heads = s.shape.batch * codec.kv_heads;
  for (int b = 0; b < s.shape.batch; ++b) row_length("sparse_attention", codec, table, b);
  struct Piece {
    int job, first, count;  // of the job's used pages
  };
  // Pages with a survivor, for each KV head; pieces of them by their number alone, so that threads change no result.
  std::vector<std::vector<int>> used(heads);
  parallel_for(heads, threads, [&](int64_t job) {
    const int length = table.lengths[job / codec.kv_heads];
    for (int p = 0; p < pages_of(length); ++p) {
      bool any = false;
      for (int r = 0; r < rows; ++r) any |= s.stats[((job * rows + r) * pages + p) * 2] >= threshold[job * rows + r];
      if (any) used[job].push_back(p);
    }
  });
  std::vector<Piece> pieces;
  std::vector<int> begin(heads + 1);
  for (int job = 0; job < heads; ++job) {
    begin[job] = int(pieces.size());
    for (int p = 0; p < int(used[job].size()); p += RUN) pieces.push_back({job, p, std::min(RUN, int(used[job].size()) - p)});
  }
  begin[heads] = int(pieces.size());
  const size_t width = size_t(rows) * (dim + 1);  // sums, then the mass of each row
  std::vector<float> parts(pieces.size() * width);
  parallel_for(int64_t(pieces.size()), threads, [&](int64_t item) {
    const Piece& piece = pieces[item];
    const int job = piece.job, b = job / codec.kv_heads, length = table.lengths[b];
    auto** records = static_cast<const uint8_t**>(thread_scratch(2, RUN * sizeof(void*)));
    float* weights = static_cast<float*>(thread_scratch(3, size_t(rows) * RUN * PAGE * sizeof(float)));
    float *sums = parts.data() + item * width, *mass = sums + size_t(rows) * dim;
    int tokens = 0;
    for (int i = 0; i < piece.count; ++i) {
      const int page = used[job][piece.first + i], valid = std::min(length - page * PAGE, int(PAGE));
      row_records(codec, table, b, job % codec.kv_heads, page, 1, records + i);
      for (int r = 0; r < rows; ++r) {
        const int64_t row = int64_t(job) * rows + r;
        float* w = weights + (size_t(r) * RUN + i) * PAGE;
        const float limit = threshold[row];
        if (s.stats[(row * pages + page) * 2] < limit) {
          std::fill(w, w + PAGE, 0.0f);
          continue;
        }
        const float* line = s.scores + row * s.max_length + int64_t(page) * PAGE;
        alignas(16) float chosen[PAGE];
        for (int t = 0; t < PAGE; ++t) {
          const bool keep = t < valid && (line[t] > limit || (line[t] == limit && page * PAGE + t <= last[row]));
          chosen[t] = keep ? line[t] : -INF;
        }
        mass[r] += page_mass(chosen, PAGE, top[row], w);
      }
      tokens += valid;  // only the last page of a row can be partly used
    }
    kernel.weigh(codec, records, tokens, weights, int64_t(RUN) * PAGE, rows, sums, thread_scratch(1, kernel.scratch_bytes(dim, rows)));
  });
  parallel_for(heads, threads, [&](int64_t job) {
    const int head = int(job % codec.kv_heads);
    float* sums = static_cast<float*>(thread_scratch(0, 2 * width * sizeof(float)));
    std::fill(sums, sums + width, 0.0f);
    for (int i = begin[job]; i < begin[job + 1]; ++i)
      for (size_t j = 0; j < width; ++j) sums[j] += parts[i * width + j];
    float *o = sums + width, *mass = sums + size_t(rows) * dim;
    kernel.apply(codec.v_inverse, head, sums, rows, o);
    const float* mu = codec.mu(codec.v_mu, head);
    for (int r = 0; r < rows; ++r) {
      const int64_t row = job * rows + r;
      const bool bad = threshold[row] != threshold[row];
      const float share = bad ? threshold[row] : mass[r] > 0 ? 1 / mass[r] : 0.0f;
      lse[row] = bad ? threshold[row] : mass[r] > 0 ? top[row] + std::log(mass[r]) : -INF;
      for (int i = 0; i < codec.head_dim; ++i)
        out[row * codec.head_dim + i] = o[size_t(r) * dim + i] * share + (mu && mass[r] > 0 ? mu[i] : 0.0f);
    }
  });
}

}  // namespace fa
