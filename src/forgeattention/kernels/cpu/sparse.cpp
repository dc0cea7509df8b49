// sparse_scores, sparse_threshold, sparse_attention.

#include "sparse.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "numbers.h"
#include "pages.h"
#include "queries.h"
#include "thread_pool.h"

namespace forge {
namespace {

constexpr int RUN = 64;  // pages of one piece of work: a multiple of a tile

typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));

int pages_of(int tokens) { return (tokens + PAGE - 1) / PAGE; }

// Calls found(i, score) for the scores [count] that are at least `bound`, in order; most groups of four have none.
template <class Found>
void at_least(const float* scores, int count, float bound, Found found) {
  const F32 limit = F32{} + bound;
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    typedef int64_t Halves __attribute__((vector_size(16)));
    const Halves any = Halves(load<F32>(scores + i) >= limit);
    if (any[0] | any[1])
      for (int j = i; j < i + 4; ++j)
        if (scores[j] >= bound) found(j, scores[j]);
  }
  for (; i < count; ++i)
    if (scores[i] >= bound) found(i, scores[i]);
}

// Sum over pages of their own sums times exp(maximum - top).
double mass_of(const float* stats, int pages, float top) {
  double mass = 0;
  for (int p = 0; p < pages; p += 4) {
    alignas(16) float x[4], sums[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = p + i < pages ? (stats[2 * (p + i)] - top) * LOG2_E : -INF;
      sums[i] = p + i < pages ? stats[2 * (p + i) + 1] : 0.0f;
    }
    const F32 e = exp2<F32, I32>(load<F32>(x)) * load<F32>(sums);
    mass += (double(e[0]) + double(e[1])) + (double(e[2]) + double(e[3]));
  }
  return mass;
}

// Fresh memory is mapped 4 KB at a time otherwise, which takes longer than writing the scores.
void advise_huge_pages(float* memory, int64_t count) {
#if defined(__linux__)
  constexpr uintptr_t HUGE_PAGE = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory + count) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
}

// What a query's threshold is looked for in: a token and its score, larger ones first, the earlier of equal ones first.
struct Candidate {
  float score;
  int position;
  bool operator<(const Candidate& other) const {
    return score > other.score || (score == other.score && position < other.position);
  }
};

// Scores by their distance to the largest, in bins of one width and one bin for all that are further away.
struct Bins {
  static constexpr int COUNT = 2048;
  float top, range, per_score;
  Bins(const float* stats, int pages, float top, float most) : top(top) {
    float least = top;
    for (int p = 0; p < pages; ++p) least = std::min(least, stats[2 * p]);
    range = std::min(2 * (top - least) + 1e-3f, most);
    per_score = COUNT / range;
  }
  // In the range whatever the scores are: what is not finite is far away.
  int of(float score) const {
    const float at = (top - score) * per_score;
    return at < COUNT ? std::max(int(at), 0) : COUNT;
  }
};
// Calls visit(token, score) for the tokens that reach `bound`; only pages that do are looked at.
template <class Visit>
void each_reaching(const float* line, int length, const float* stats, int pages, float bound, Visit visit) {
  for (int p = 0; p < pages; ++p)
    if (stats[2 * p] >= bound)
      at_least(line + p * PAGE, std::min(length - p * PAGE, int(PAGE)), bound,
               [&](int t, float score) { visit(p * PAGE + t, score); });
}
// A score that k tokens reach, found by counting; k is at least the number of pages.
float lower_bound_many(const float* line, int length, const float* stats, int pages, int k, float top) {
  const Bins bins(stats, pages, top, INF);
  int counts[Bins::COUNT + 1] = {};
  for (int t = 0; t < length; ++t) ++counts[bins.of(line[t])];
  int bin = 0;
  for (int above = counts[0]; above < k && bin < Bins::COUNT; above += counts[bin]) ++bin;
  // Slack for rounding: a bound that is a little low only costs time.
  return bin == Bins::COUNT ? -INF : top - float(bin + 1) / bins.per_score - 1e-5f * (std::fabs(top) + bins.range);
}
// A score under which no kept token can lie, so that only pages that reach it need be looked at.
float lower_bound_k(const float* stats, int pages, int k, std::vector<float>& room) {
  room.resize(pages);
  for (int p = 0; p < pages; ++p) room[p] = stats[2 * p];
  std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<float>());
  return room[k - 1];
}
// The fewest tokens, largest scores first, that leave at most `may_drop` of the mass `packed`; the mass of all but the
// last bin's is known by bins, so that only the tokens of that bin are sorted. Gives the last one kept; `held` and
// `count` are of all that are.
Candidate last_by_mass(const float* line, int length, const float* stats, int pages, float top, double packed,
                       double may_drop, float bound, std::vector<Candidate>& room, double& held, int& count) {
  const Bins bins(stats, pages, top, 40);
  static thread_local std::vector<double> mass;
  static thread_local std::vector<int> counts;
  mass.assign(Bins::COUNT + 1, 0);
  counts.assign(Bins::COUNT + 1, 0);
  const auto each = [&](const auto& visit) { each_reaching(line, length, stats, pages, bound, visit); };
  each([&](int, float score) {
    const int bin = bins.of(score);
    mass[bin] += std::exp(score - top);
    ++counts[bin];
  });
  held = 0;
  count = 0;
  Candidate lowest{INF, -1};
  for (int bin = 0; bin <= Bins::COUNT && packed - held > may_drop; ++bin) {
    if (bin < Bins::COUNT && packed - held - mass[bin] > may_drop) {
      held += mass[bin];
      count += counts[bin];
      continue;
    }
    room.clear();
    each([&](int position, float score) {
      if (bins.of(score) == bin) room.push_back({score, position});
    });
    std::sort(room.begin(), room.end());
    for (size_t i = 0; i < room.size() && packed - held > may_drop; ++i) {
      held += std::exp(double(room[i].score) - top);
      ++count;
      lowest = room[i];
    }
  }
  if (lowest.position < 0 && count) {
    // Rounding left nothing to sort: the last of the bins that are kept whole.
    room.clear();
    each([&](int position, float score) { room.push_back({score, position}); });
    std::nth_element(room.begin(), room.begin() + (count - 1), room.end());
    lowest = room[count - 1];
  }
  return lowest;
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

void sparse_scores(const Codec& codec, Shape shape, const Array4& q, const Table& table, float scale, float* scores,
                   float* stats, int threads) {
  const Kernels& kernel = kernels();
  const int kv_heads = codec.kv_heads, rows = shape.q_heads / kv_heads * shape.n, dim = codec.dim;
  const int all_pages = pages_of(table.max_length), runs = (all_pages + RUN - 1) / RUN;
  for (int b = 0; b < shape.batch; ++b) row_length("sparse_scores", codec, table, b);
  const int64_t jobs = int64_t(shape.batch) * kv_heads, stride = table.max_length;
  advise_huge_pages(scores, jobs * rows * stride);
  const size_t query_bytes = kernel.queries_bytes(dim, rows);
  auto* prepared = static_cast<uint8_t*>(thread_scratch(3, jobs * query_bytes));
  parallel_for(jobs, threads, [&](int64_t job) {
    prepare_queries(codec, shape, q, int(job / kv_heads), int(job % kv_heads), 0, rows, scale,
                    prepared + job * query_bytes);
  });
  // Memory is read as it lies, the heads of a page together.
  const int heads = together(kv_heads, int64_t(shape.batch) * runs, threads);
  const int parts = (kv_heads + heads - 1) / heads;
  parallel_for(int64_t(shape.batch) * runs * parts, threads, [&](int64_t item) {
    const int head = int(item % parts) * heads, run = int(item / parts % runs), b = int(item / parts / runs);
    const int here = std::min(heads, kv_heads - head), first = run * RUN, end = std::min(first + RUN, all_pages);
    const int tokens = std::clamp(table.lengths[b] - first * PAGE, 0, (end - first) * PAGE), used = pages_of(tokens);
    const int64_t job = int64_t(b) * kv_heads + head, row0 = job * rows;
    float* to = scores + row0 * stride + int64_t(first) * PAGE;
    float* stats_to = stats + (row0 * all_pages + first) * 2;
    if (tokens) {
      auto** records = static_cast<const uint8_t**>(thread_scratch(2, RUN * sizeof(void*)));
      row_records(codec, table, b, head, first, used, records);
      std::vector<uint8_t*> queries;
      for (int h = 0; h < here; ++h) queries.push_back(prepared + (job + h) * query_bytes);
      kernel.scores(codec, records, tokens, here, queries.data(), rows, to, stride, stats_to, int64_t(all_pages) * 2,
                    thread_scratch(1, kernel.scratch_bytes(dim, 0)));
    }
    for (int r = 0; r < here * rows; ++r) {
      float *line = to + r * stride, *of_pages = stats_to + int64_t(r) * all_pages * 2;
      for (int t = tokens; t < std::min((end - first) * PAGE, table.max_length - first * PAGE); ++t) line[t] = -INF;
      for (int p = used; p < end - first; ++p) {
        of_pages[2 * p] = -INF;
        of_pages[2 * p + 1] = 0;
      }
    }
  });
}

void page_scores(const Codec& codec, Shape shape, const Array4& q, const Table& table, float scale, float* out,
                 int threads) {
  const int rows = shape.q_heads / codec.kv_heads * shape.n, dim = codec.dim, all_pages = pages_of(table.max_length);
  constexpr int MANY = 512, AHEAD = 12;  // pages of one piece of work; pages whose means are fetched ahead
  const int runs = (all_pages + MANY - 1) / MANY;
  for (int b = 0; b < shape.batch; ++b) row_length("page_scores", codec, table, b);
  parallel_for(int64_t(shape.batch) * codec.kv_heads * runs, threads, [&](int64_t item) {
    const int run = int(item % runs), head = int(item / runs % codec.kv_heads), b = int(item / runs / codec.kv_heads);
    const int first = run * MANY, end = std::min(first + MANY, all_pages), used = pages_of(table.lengths[b]);
    const int64_t row0 = (int64_t(b) * codec.kv_heads + head) * rows;
    float* x = static_cast<float*>(thread_scratch(0, size_t(rows + 1) * dim * sizeof(float)));
    float* shifts = static_cast<float*>(thread_scratch(1, size_t(rows) * sizeof(float)));
    for (int r = 0; r < rows; ++r)
      shifts[r] = float(rotate_query(codec, shape, q, b, head, r, x + size_t(rows) * dim, x + size_t(r) * dim) * scale);
    const int count = std::clamp(used - first, 0, end - first), at = mean_offset(dim, codec.k.bits, codec.scales);
    auto** records = static_cast<const uint8_t**>(thread_scratch(2, MANY * sizeof(void*)));
    row_records(codec, table, b, head, first, count, records);
    for (int p = first; p < end; ++p) {
      alignas(16) float mean[MAX_DIM];
      float step = 0;
      // Each row of means lies by itself in memory.
      if (p - first + AHEAD < count)
        for (int i = 0; i < dim; i += 64) __builtin_prefetch(records[p - first + AHEAD] + at + i);
      if (p < used) {
        const uint8_t* line = records[p - first] + at;
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

void sparse_threshold(const Scored& s, const int* lengths, const int* budgets, int budget, float top_p,
                      const float* exact_lse, float* threshold, int* last, int* kept, float* dropped, float* tops,
                      int threads) {
  const int pages = pages_of(s.max_length);
  for (int b = 0; b < s.shape.batch; ++b)
    if (lengths[b] < 0 || lengths[b] > s.max_length)
      throw std::invalid_argument("[sparse_threshold] expected packed lengths within max_length; got another one");
  const int per_row = s.shape.q_heads * s.shape.n;
  parallel_for(int64_t(s.shape.batch) * per_row, threads, [&](int64_t row) {
    const int b = int(row / per_row), head = int(row % per_row / s.shape.n), length = lengths[b],
              used = pages_of(length);
    const float* line = s.scores + row * s.max_length;
    const float* stats = s.stats + row * pages * 2;
    float top = -INF;
    for (int p = 0; p < used; ++p) top = std::max(top, stats[2 * p]);
    const double packed = mass_of(stats, used, top);
    const double exact = exact_lse && exact_lse[row] > -INF ? std::exp(double(exact_lse[row]) - top) : 0,
                 total = packed + exact;
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
    double held = 0;
    int count = k;
    Candidate lowest{INF, -1};
    if (top_p > 0) {
      const float bound = lower_bound_p(stats, used, top, may_drop, candidates);
      lowest = last_by_mass(line, length, stats, used, top, packed, may_drop, bound, candidates, held, count);
    } else {
      const float bound =
          k >= used ? lower_bound_many(line, length, stats, used, k, top) : lower_bound_k(stats, used, k, maxima);
      candidates.clear();
      each_reaching(line, length, stats, used, bound,
                    [&](int token, float score) { candidates.push_back({score, token}); });
      if (count < int(candidates.size()))
        std::nth_element(candidates.begin(), candidates.begin() + (count - 1), candidates.end());
      for (int i = 0; i < count; ++i) {
        held += std::exp(double(candidates[i].score) - top);
        if (lowest < candidates[i] || lowest.position < 0) lowest = candidates[i];
      }
    }
    threshold[row] = lowest.score;
    last[row] = lowest.position;
    kept[row] = count;
    dropped[row] = exact < INF ? float(std::max(0.0, packed - held) / total) : 0.0f;
  });
}

void sparse_attention(const Codec& codec, const Scored& s, const Table& table, const float* threshold, const int* last,
                      const float* top, float* out, float* lse, int threads) {
  const Kernels& kernel = kernels();
  const int rows = s.shape.q_heads / codec.kv_heads * s.shape.n, dim = codec.dim, pages = pages_of(s.max_length);
  const int heads = s.shape.batch * codec.kv_heads;
  for (int b = 0; b < s.shape.batch; ++b) row_length("sparse_attention", codec, table, b);
  // Rows of a KV head that read the same pages together, and those pages.
  struct Group {
    int row, rows;
    std::vector<int> pages;
  };
  struct Piece {
    int job;
    const Group* group;
    int first, count;  // of the group's pages
    size_t part;       // its sums, then the mass of each row, in `parts`
  };
  // Everything follows from a KV head's own survivors, so that threads and batch change no result.
  std::vector<std::vector<Group>> groups(heads);
  parallel_for(heads, threads, [&](int64_t job) {
    const int used = pages_of(table.lengths[job / codec.kv_heads]);
    Group all{0, rows, {}};
    std::vector<Group> single(rows);
    for (int r = 0; r < rows; ++r) single[r] = {r, 1, {}};
    size_t total = 0;
    for (int p = 0; p < used; ++p) {
      const size_t before = total;
      for (int r = 0; r < rows; ++r)
        if (s.stats[((job * rows + r) * pages + p) * 2] >= threshold[job * rows + r]) {
          single[r].pages.push_back(p);
          ++total;
        }
      if (total > before) all.pages.push_back(p);
    }
    // To unpack a page costs as much as three rows' sums: where few rows share their pages, each reads its own.
    if (2 * total < 3 * all.pages.size())
      groups[job] = std::move(single);
    else
      groups[job].push_back(std::move(all));
  });
  std::vector<Piece> pieces;
  std::vector<size_t> begin(heads + 1);
  size_t size = 0;
  for (int job = 0; job < heads; ++job) {
    begin[job] = pieces.size();
    for (const Group& group : groups[job])
      for (int p = 0, n = int(group.pages.size()); p < n; p += RUN) {
        pieces.push_back({job, &group, p, std::min(RUN, n - p), size});
        size += size_t(group.rows) * (dim + 1);
      }
  }
  begin[heads] = pieces.size();
  std::vector<float> parts(size);
  parallel_for(int64_t(pieces.size()), threads, [&](int64_t item) {
    const Piece& piece = pieces[item];
    const Group& group = *piece.group;
    const int b = piece.job / codec.kv_heads, length = table.lengths[b];
    auto** records = static_cast<const uint8_t**>(thread_scratch(2, RUN * sizeof(void*)));
    float* weights = static_cast<float*>(thread_scratch(3, size_t(group.rows) * RUN * PAGE * sizeof(float)));
    float *sums = parts.data() + piece.part, *mass = sums + size_t(group.rows) * dim;
    int tokens = 0;
    for (int i = 0; i < piece.count; ++i) {
      const int page = group.pages[piece.first + i], valid = std::min(length - page * PAGE, int(PAGE));
      row_records(codec, table, b, piece.job % codec.kv_heads, page, 1, records + i);
      for (int r = 0; r < group.rows; ++r) {
        const int64_t row = int64_t(piece.job) * rows + group.row + r;
        float* w = weights + (size_t(r) * RUN + i) * PAGE;
        std::fill(w, w + PAGE, 0.0f);
        const float limit = threshold[row];
        if (!(s.stats[(row * pages + page) * 2] >= limit)) continue;
        at_least(s.scores + row * s.max_length + int64_t(page) * PAGE, valid, limit, [&](int t, float score) {
          if (score > limit || page * PAGE + t <= last[row]) mass[r] += w[t] = std::exp(score - top[row]);
        });
      }
      tokens += valid;  // only the last page of a row can be partly used
    }
    kernel.weigh(codec, records, tokens, weights, int64_t(RUN) * PAGE, group.rows, sums,
                 thread_scratch(1, kernel.scratch_bytes(dim, group.rows)));
  });
  parallel_for(heads, threads, [&](int64_t job) {
    const int head = int(job % codec.kv_heads);
    const size_t width = size_t(rows) * (dim + 1);
    float* sums = static_cast<float*>(thread_scratch(0, 2 * width * sizeof(float)));
    std::fill(sums, sums + width, 0.0f);
    float *o = sums + width, *mass = sums + size_t(rows) * dim;
    for (size_t i = begin[job]; i < begin[job + 1]; ++i) {
      const Group& group = *pieces[i].group;
      const float *from = parts.data() + pieces[i].part, *masses = from + size_t(group.rows) * dim;
      for (int j = 0; j < group.rows * dim; ++j) sums[size_t(group.row) * dim + j] += from[j];
      for (int r = 0; r < group.rows; ++r) mass[group.row + r] += masses[r];
    }
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

}  // namespace forge
