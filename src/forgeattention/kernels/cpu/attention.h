// Attention over packed tokens, a tile of four pages of one KV head at a time: integer scores, online softmax in
// base 2, weights times value scales quantised once per tile, integer value sums.
#pragma once

#include "numbers.h"
#include "qk_scores.h"
#include "value_sum.h"

namespace forge {

template <class Isa>
struct Attention {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  using Operand = typename Isa::Operand;
  static constexpr int W = Isa::WORDS;

  typedef void (*QkPage)(const uint8_t*, const uint8_t*, int, const int8_t*, void*, int32_t*, size_t);
  typedef void (*ValueTile)(const uint8_t* const*, const uint8_t* const*, int, int, const int8_t*, const Operand*,
                            size_t, float*, const float*, const float*);
  typedef void (*Unpack)(const uint8_t*, int, const int8_t*, uint8_t*);

  template <int CLASS, class S>
  static QkPage qk_rows(int rows) {
    static const QkPage table[] = {qk_page<Isa, CLASS, S, 1>, qk_page<Isa, CLASS, S, 2>, qk_page<Isa, CLASS, S, 3>,
                                   qk_page<Isa, CLASS, S, 4>};
    return table[rows - 1];
  }
  template <int CHUNK, class S>
  static ValueTile value_rows(int rows) {
    static const ValueTile table[] = {value_tile<Isa, CHUNK, S, 1>, value_tile<Isa, CHUNK, S, 2>,
                                      value_tile<Isa, CHUNK, S, 3>, value_tile<Isa, CHUNK, S, 4>};
    return table[rows - 1];
  }

  // The one list of sources: F<Source>::get() for a source index.
  template <class R, template <class> class F, class... Args>
  static R by_source(int source, Args... args) {
    switch (source) {
      case 0: return F<Packed<2, SCALAR>>::get(args...);
      case 1: return F<Packed<3, SCALAR>>::get(args...);
      case 2: return F<Packed<4, SCALAR>>::get(args...);
      case 3: return F<Packed<2, TRELLIS4>>::get(args...);
      case 4: return F<Packed<3, TRELLIS4>>::get(args...);
      case 5: return F<Packed<2, TRELLIS8>>::get(args...);
      case 6: return F<Packed<3, TRELLIS8>>::get(args...);
      default: return F<Unpacked>::get(args...);
    }
  }
  template <class S>
  struct Qk {
    static QkPage get(int key_class, int rows) {
      return key_class == 0 ? qk_rows<0, S>(rows) : key_class == 1 ? qk_rows<1, S>(rows) : qk_rows<2, S>(rows);
    }
  };
  template <class S>
  struct Value {
    static ValueTile get(int chunk, int rows) { return chunk == 4 ? value_rows<4, S>(rows) : value_rows<2, S>(rows); }
  };
  template <class S>
  struct Unpacker {
    static Unpack get(int chunk, bool keys) {
      if (chunk == 4) return keys ? Unpack(unpack<Isa, 4, S, true>) : Unpack(unpack<Isa, 4, S, false>);
      return keys ? Unpack(unpack<Isa, 2, S, true>) : Unpack(unpack<Isa, 2, S, false>);
    }
  };

  static void gather(int dim, const int32_t* raw, int32_t* out) {
    switch (dim) {
      case 64: return gather_scores<Isa, 64>(raw, out);
      case 96: return gather_scores<Isa, 96>(raw, out);
      case 128: return gather_scores<Isa, 128>(raw, out);
      case 256: return gather_scores<Isa, 256>(raw, out);
      default: return gather_scores<Isa, 512>(raw, out);
    }
  }
  static int raw_words(int dim) { return 2 * dim * (dim == 64 ? 2 : dim == 96 ? 4 : 1); }
  static int weight_operands(int dim) {
    return chunk(dim) == 4 ? WeightLayout<Isa, 4>::COUNT : WeightLayout<Isa, 2>::COUNT;
  }

  static size_t group_bytes(int dim) {
    switch (key_class(dim)) {
      case 0: return QueryLayout<Isa, 0>::bytes(dim);
      case 1: return QueryLayout<Isa, 1>::bytes(dim);
      default: return QueryLayout<Isa, 2>::bytes(dim);
    }
  }

  static size_t queries_bytes(int dim, int rows) { return (rows + MAX_ROWS - 1) / MAX_ROWS * group_bytes(dim); }
  static uint8_t* group_of(uint8_t* queries, int dim, int row) { return queries + row / MAX_ROWS * group_bytes(dim); }
  static QueryHead* head_of(uint8_t* queries, int dim, int row) {
    return reinterpret_cast<QueryHead*>(group_of(queries, dim, row) + row % MAX_ROWS * query_head_bytes(dim));
  }

  static void prepare(const Codec& codec, const float* q, float offset, float scale, uint8_t* queries, int row) {
    const int dim = codec.dim;
    constexpr float Q_MAX = 32512;  // both bytes of a split stay within int8
    float top = 0;
    bool finite = true;
    for (int i = 0; i < dim; ++i) {
      const float a = q[i] < 0 ? -q[i] : q[i];
      finite &= a < INF;
      top = a > top ? a : top;
    }
    // A query that is not finite makes its row's results NaN.
    const float step = finite ? top / Q_MAX : 0, inverse = step > 0 ? Q_MAX / top : 0;
    QueryHead* head = head_of(queries, dim, row);
    *head = {step * scale * codec.k.unit, finite ? offset : __builtin_nanf(""), scale, 0};
    float* kept = reinterpret_cast<float*>(head + 1);
    int16_t q16[MAX_DIM];
    for (int i = 0; i < dim; ++i) {
      kept[i] = finite ? q[i] : 0.0f;
      q16[i] = int16_t(__builtin_rintf(kept[i] * inverse));
    }
    uint8_t* group = group_of(queries, dim, row);
    switch (key_class(dim)) {
      case 0: return prepare_query<Isa, 0>(q16, dim, row % MAX_ROWS, group);
      case 1: return prepare_query<Isa, 1>(q16, dim, row % MAX_ROWS, group);
      default: return prepare_query<Isa, 2>(q16, dim, row % MAX_ROWS, group);
    }
  }

  // Scratch of the three drivers, carved from one block.
  struct Scratch {
    int32_t* raw;                // [MAX_ROWS][raw_words]
    float* scores;               // [MAX_ROWS][TILE]
    float *k_scales, *v_scales;  // [TILE]
    Operand* operands;           // [MAX_ROWS][TILE_PAGES][weight_operands]
    uint8_t *keys, *values;      // unpacked, [TILE_PAGES][PAGE * dim]
    float* acc;                  // [rows][4 * dim]
    uint8_t* end;

    Scratch(void* block, int dim, int rows) {
      uint8_t* at = static_cast<uint8_t*>(block);
      const auto take = [&](size_t bytes) {
        uint8_t* p = at;
        at += (bytes + 63) / 64 * 64;
        return p;
      };
      raw = reinterpret_cast<int32_t*>(take(sizeof(int32_t) * MAX_ROWS * raw_words(dim)));
      scores = reinterpret_cast<float*>(take(sizeof(float) * MAX_ROWS * TILE));
      k_scales = reinterpret_cast<float*>(take(sizeof(float) * TILE));
      v_scales = reinterpret_cast<float*>(take(sizeof(float) * TILE));
      operands = reinterpret_cast<Operand*>(take(sizeof(Operand) * MAX_ROWS * TILE_PAGES * weight_operands(dim)));
      keys = take(TILE * dim);
      values = take(TILE * dim);
      acc = reinterpret_cast<float*>(take(sizeof(float) * 4 * dim * rows));
      end = at;
    }
  };
  static size_t scratch_bytes(int dim, int rows) {
    return size_t(Scratch(nullptr, dim, rows).end - static_cast<uint8_t*>(nullptr));
  }

  // A tile: up to four records of one head, the tokens of them that count, and the records read after them, fetched
  // ahead.
  struct Tile {
    int pages, tokens;
    const uint8_t *keys[TILE_PAGES], *values[TILE_PAGES], *keys_ahead[TILE_PAGES], *values_ahead[TILE_PAGES];
    const uint8_t* mean[TILE_PAGES];
    float mean_step[TILE_PAGES];
    int key_source, value_source;
  };
  static Tile open_tile(const Codec& c, const uint8_t* const* records, int head, int heads, int first_page, int tokens,
                        bool with_keys, bool with_values, bool unpack, Scratch& s) {
    Tile t;
    const int all_pages = (tokens + PAGE - 1) / PAGE;
    t.pages = all_pages - first_page < TILE_PAGES ? all_pages - first_page : int(TILE_PAGES);
    t.tokens = tokens - first_page * PAGE < TILE ? tokens - first_page * PAGE : int(TILE);
    const int dim = c.dim, values_at = v_offset(dim, c.k.bits, c.scales),
              mean_at = mean_offset(dim, c.k.bits, c.scales);
    const int k_scales_at = k_scale_offset(dim, c.k.bits),
              v_scales_at = v_scale_offset(dim, c.k.bits, c.v.bits, c.scales);
    for (int p = 0; p < t.pages; ++p) {
      const uint8_t* record = records[first_page + p] + size_t(head) * c.record();
      const int next = first_page + p + TILE_PAGES;
      const uint8_t* ahead = head + 1 < heads ? record + c.record() : records[next < all_pages ? next : first_page + p];
      t.keys[p] = record;
      t.values[p] = record + values_at;
      t.keys_ahead[p] = ahead;
      t.values_ahead[p] = ahead + values_at;
      for (int i = k_scales_at; i < values_at; i += 64) Isa::prefetch(ahead + i);
      for (int i = v_scales_at; i < c.record(); i += 64) Isa::prefetch(ahead + i);
      t.mean[p] = record + mean_at;
      const Header h = read_header(t.mean[p]);
      t.mean_step[p] = h.mean_step;
      if (with_keys) read_scales<Isa>(record + k_scales_at, c.scales, h.k_base, s.k_scales + p * PAGE);
      if (with_values) read_scales<Isa>(record + v_scales_at, c.scales, h.v_base, s.v_scales + p * PAGE);
    }
    for (int i = t.tokens; i < t.pages * PAGE; ++i) s.k_scales[i] = s.v_scales[i] = 0;  // whatever is stored there
    t.key_source = source_index(c.k);
    t.value_source = source_index(c.v);
    if (!unpack) return t;
    const Unpack keys = by_source<Unpack, Unpacker>(t.key_source, chunk(dim), true);
    const Unpack values = by_source<Unpack, Unpacker>(t.value_source, chunk(dim), false);
    const int chunks = units(dim) / chunk(dim);
    for (int p = 0; p < t.pages; ++p) {
      if (with_keys) keys(t.keys[p], chunks, c.k.levels, s.keys + p * PAGE * dim);
      if (with_values) values(t.values[p], chunks, c.v.levels, s.values + p * PAGE * dim);
      t.keys[p] = s.keys + p * PAGE * dim;
      t.values[p] = s.values + p * PAGE * dim;
    }
    t.key_source = t.value_source = UNPACKED;
    return t;
  }

  // Scores of the `rows` rows from `first`, a multiple of MAX_ROWS, against a tile: [rows][TILE], in base-2 units.
  static void score_tile(const Codec& c, const Tile& t, uint8_t* queries, int first, int rows, Scratch& s) {
    const int dim = c.dim, words = raw_words(dim);
    const QkPage qk = by_source<QkPage, Qk>(t.key_source, key_class(dim), rows);
    alignas(64) float mean[MAX_DIM];
    for (int p = 0; p < t.pages; ++p) {
      for (int i = 0; i < dim; ++i) mean[i] = float(reinterpret_cast<const int8_t*>(t.mean[p])[i]);
      qk(t.keys[p], t.keys_ahead[p], dim, c.k.levels, group_of(queries, dim, first), s.raw, words);
      F32 product[MAX_ROWS] = {};
      for (int i = 0; i < dim; i += W)
        for (int r = 0; r < rows; ++r)
          product[r] +=
              load<F32>(reinterpret_cast<const float*>(head_of(queries, dim, first + r) + 1) + i) * load<F32>(mean + i);
      for (int r = 0; r < rows; ++r) {
        const QueryHead* head = head_of(queries, dim, first + r);
        const float base = head->offset + sum_of(product[r]) * (head->scale * t.mean_step[p]), factor = head->factor;
        alignas(64) int32_t integer[PAGE];
        gather(dim, s.raw + r * words, integer);
        float* out = s.scores + r * TILE + p * PAGE;
        const float* k_scales = s.k_scales + p * PAGE;
        for (int i = 0; i < PAGE; i += W) {
          const F32 x = __builtin_convertvector(load<I32>(integer + i), F32);
          put(out + i, x * (load<F32>(k_scales + i) * factor) + base);
        }
      }
    }
    if (t.tokens < t.pages * PAGE)
      for (int r = 0; r < rows; ++r)
        for (int i = t.tokens; i < t.pages * PAGE; ++i) s.scores[r * TILE + i] = -INF;
  }

  // Weights [pages * 64] to operands; returns what one unit of them is worth.
  static float quantise_weights(const float* w, float top, int pages, int dim, Operand* out) {
    const float up = top > 0 ? Isa::WEIGHT_MAX / top : 0;
    const int count = weight_operands(dim);
    for (int p = 0; p < pages; ++p) {
      if (chunk(dim) == 4)
        prepare_weights<Isa, 4>(w + p * PAGE, up, out + p * count);
      else
        prepare_weights<Isa, 2>(w + p * PAGE, up, out + p * count);
    }
    return top / Isa::WEIGHT_MAX;
  }

  static void attend(const Codec& c, const uint8_t* const* records, int tokens, int heads, uint8_t* const* queries,
                     int rows, bool unpack, const Partial* out, void* scratch) {
    const int dim = c.dim;
    Scratch s(scratch, dim, heads * rows);
    for (int i = 0; i < heads * rows * 4 * dim; ++i) s.acc[i] = 0;
    for (int h = 0; h < heads; ++h)
      for (int r = 0; r < rows; ++r) {
        out[h].max[r] = -INF;
        out[h].sum[r] = 0;
      }
    for (int first = 0; first * PAGE < tokens; first += TILE_PAGES)
      for (int h = 0; h < heads; ++h)
        attend_tile(c, open_tile(c, records, h, heads, first, tokens, true, true, unpack, s), queries[h], rows, out[h],
                    s.acc + h * rows * 4 * dim, s);
    for (int h = 0; h < heads; ++h)
      for (int r = 0; r < rows; ++r) {
        float* o = out[h].o + r * dim;
        gather_row(c, s.acc + (h * rows + r) * 4 * dim, o);
        const float offset = head_of(queries[h], dim, r)->offset;
        if (offset != offset) {
          out[h].max[r] = 0;
          out[h].sum[r] = offset;
          for (int i = 0; i < dim; ++i) o[i] = offset;
        }
      }
  }

  // Adds a tile of one head to its maxima, sums and accumulators acc [rows][4 * dim].
  static void attend_tile(const Codec& c, const Tile& t, uint8_t* queries, int rows, const Partial& out, float* acc,
                          Scratch& s) {
    const int dim = c.dim, count = weight_operands(dim);
    for (int row = 0; row < rows; row += MAX_ROWS) {
      const int n = rows - row < MAX_ROWS ? rows - row : int(MAX_ROWS);
      score_tile(c, t, queries, row, n, s);
      float rescale[MAX_ROWS], step[MAX_ROWS];
      for (int r = 0; r < n; ++r) {
        float* w = s.scores + r * TILE;
        F32 top = load<F32>(w);
        for (int i = W; i < t.pages * PAGE; i += W) {
          const F32 x = load<F32>(w + i);
          top = x > top ? x : top;
        }
        const float before = out.max[row + r], here = max_of(top), now = here > before ? here : before;
        F32 sum = F32{}, largest = F32{};
        for (int i = 0; i < t.pages * PAGE; i += W) {
          const F32 p = exp2<F32, I32>(load<F32>(w + i) - now);
          const F32 weight = p * load<F32>(s.v_scales + i);
          sum += p;
          largest = weight > largest ? weight : largest;
          put(w + i, weight);
        }
        rescale[r] = before == -INF ? 0.0f : load_first(exp2<F32, I32>(F32{} + (before - now)));
        out.max[row + r] = now;
        out.sum[row + r] = out.sum[row + r] * rescale[r] + sum_of(sum);
        step[r] = quantise_weights(w, max_of(largest), t.pages, dim, s.operands + r * TILE_PAGES * count);
      }
      by_source<ValueTile, Value>(t.value_source, chunk(dim), n)(
          t.values, t.values_ahead, t.pages, dim, c.v.levels, s.operands, 4 * dim, acc + row * 4 * dim, rescale, step);
    }
  }

  static void scores(const Codec& c, const uint8_t* const* records, int tokens, int heads, uint8_t* const* queries,
                     int rows, float* out, int64_t stride, float* stats, int64_t stats_stride, void* scratch) {
    Scratch s(scratch, c.dim, 0);
    for (int first = 0; first * PAGE < tokens; first += TILE_PAGES)
      for (int h = 0; h < heads; ++h) {
        const Tile t = open_tile(c, records, h, heads, first, tokens, true, false, false, s);
        for (int row = 0; row < rows; row += MAX_ROWS) {
          const int n = rows - row < MAX_ROWS ? rows - row : int(MAX_ROWS);
          score_tile(c, t, queries[h], row, n, s);
          for (int r = 0; r < n; ++r) {
            const float* from = s.scores + r * TILE;
            const int64_t at = h * rows + row + r;
            __builtin_memcpy(out + at * stride + first * PAGE, from, sizeof(float) * t.tokens);
            for (int p = 0; stats && p < t.pages; ++p)
              page_stats(from + p * PAGE, stats + at * stats_stride + 2 * (first + p));
          }
        }
      }
  }

  // The largest of 64 scores and the sum of exp(score - that).
  static void page_stats(const float* scores, float* out) {
    F32 top = F32{} - INF;
    for (int i = 0; i < PAGE; i += W) {
      const F32 x = load<F32>(scores + i);
      top = x > top ? x : top;
    }
    const float most = max_of(top);
    F32 sum = F32{};
    for (int i = 0; i < PAGE; i += W) sum += exp2<F32, I32>((load<F32>(scores + i) - most) * LOG2_E);
    out[0] = most;
    out[1] = sum_of(sum);
  }

  static void weigh(const Codec& c, const uint8_t* const* records, int tokens, const float* weights, int64_t stride,
                    int rows, float* o, void* scratch) {
    const int dim = c.dim, count = weight_operands(dim);
    Scratch s(scratch, dim, rows);
    for (int i = 0; i < rows * 4 * dim; ++i) s.acc[i] = 0;
    for (int first = 0; first * PAGE < tokens; first += TILE_PAGES) {
      const Tile t = open_tile(c, records, 0, 1, first, tokens, false, true, false, s);
      for (int row = 0; row < rows; row += MAX_ROWS) {
        const int n = rows - row < MAX_ROWS ? rows - row : int(MAX_ROWS);
        float rescale[MAX_ROWS], step[MAX_ROWS];
        for (int r = 0; r < n; ++r) {
          float* w = s.scores;
          const float* in = weights + (row + r) * stride + first * PAGE;
          F32 top = F32{};
          for (int i = t.tokens / W * W; i < t.pages * PAGE; ++i) w[i] = i < t.tokens ? in[i] * s.v_scales[i] : 0.0f;
          for (int i = 0; i < t.pages * PAGE; i += W) {
            if (i + W <= t.tokens) put(w + i, load<F32>(in + i) * load<F32>(s.v_scales + i));
            const F32 x = load<F32>(w + i);
            top = x > top ? x : top;
          }
          rescale[r] = 1;
          step[r] = quantise_weights(w, max_of(top), t.pages, dim, s.operands + r * TILE_PAGES * count);
        }
        by_source<ValueTile, Value>(t.value_source, chunk(dim), n)(t.values, t.values_ahead, t.pages, dim, c.v.levels,
                                                                   s.operands, 4 * dim, s.acc + row * 4 * dim, rescale,
                                                                   step);
      }
    }
    for (int r = 0; r < rows; ++r) gather_row(c, s.acc + r * 4 * dim, o + r * dim);
  }

  static void gather_row(const Codec& c, const float* acc, float* o) {
    if (chunk(c.dim) == 4)
      gather_values<Isa, 4>(acc, c.dim, c.v.unit, o);
    else
      gather_values<Isa, 2>(acc, c.dim, c.v.unit, o);
  }
  static float load_first(F32 v) { return v[0]; }

  // Where unpacked levels belong in [token][channel]: of each vector and lane, the first of eight channels of a token
  // for keys, which two vectors hold in turns, and the first of four tokens for values.
  struct Order {
    uint16_t keys[PAGE * MAX_DIM / 8], values[PAGE * MAX_DIM / 4];
    explicit Order(int dim) {
      const int chunks = units(dim) / chunk(dim);
      uint16_t *k = keys, *v = values;
      for (int uc = 0; uc < chunks; ++uc)
        for (int lv = 0; lv < LANES * chunk(dim) / W; ++lv)
          for (int i = 0; i < 8; ++i)
            for (int pos = 0; pos < W; ++pos) {
              const int lane = (lv * W + pos) / chunk(dim), unit = uc * chunk(dim) + pos % chunk(dim), n = i >> 1,
                        half = i & 1;
              if (!half) *k++ = uint16_t(k_token(dim, lane, unit, n) * dim + k_channel(dim, lane, unit, n, 0));
              const bool four = chunk(dim) == 4;
              const int v_lane =
                  four ? Layout<Isa, 4>::value_lane(lv, half, pos) : Layout<Isa, 2>::value_lane(lv, half, pos);
              const int v_unit =
                  four ? Layout<Isa, 4>::value_unit(uc, half, pos) : Layout<Isa, 2>::value_unit(uc, half, pos);
              const int e = 4 * (pos & 1);
              *v++ = uint16_t(v_token(v_lane, n, e) * dim + v_channel(v_lane, v_unit, e));
            }
    }
  };
  static const Order& order(int dim) {
    switch (dim) {
      case 64: {
        static const Order o(64);
        return o;
      }
      case 96: {
        static const Order o(96);
        return o;
      }
      case 128: {
        static const Order o(128);
        return o;
      }
      case 256: {
        static const Order o(256);
        return o;
      }
      default: {
        static const Order o(512);
        return o;
      }
    }
  }
  // The bytes of a word at every other byte of eight.
  static FORGE_INLINE uint64_t spread(uint32_t word) {
    uint64_t x = word;
    x = (x | x << 16) & 0x0000FFFF0000FFFFu;
    return (x | x << 8) & 0x00FF00FF00FF00FFu;
  }

  static void decode(const Codec& c, const uint8_t* record, float* k, float* v, void* scratch) {
    const int dim = c.dim, vectors = PAGE * dim / (4 * W);
    Scratch s(scratch, dim, 0);
    const Tile t = open_tile(c, &record, 0, 1, 0, PAGE, true, true, true, s);
    const Order& to = order(dim);
    int8_t level[PAGE * MAX_DIM];
    const uint16_t* at = to.keys;
    for (int i = 0; i < vectors; i += 2)
      for (int pos = 0; pos < W; ++pos) {
        const uint8_t* from = t.keys[0] + 4 * (i * W + pos);
        const uint64_t eight = spread(load<uint32_t>(from)) | spread(load<uint32_t>(from + 4 * W)) << 8;
        put(level + *at++, Isa::KEY_BIAS ? eight ^ 0x8080808080808080u : eight);
      }
    float mean[MAX_DIM];
    for (int i = 0; i < dim; ++i) mean[i] = float(reinterpret_cast<const int8_t*>(t.mean[0])[i]) * t.mean_step[0];
    for (int token = 0; token < PAGE; ++token)
      for (int i = 0; i < dim; ++i)
        k[token * dim + i] = s.k_scales[token] * (c.k.unit * float(level[token * dim + i])) + mean[i];
    at = to.values;
    for (int i = 0; i < vectors * W; ++i) {  // the bytes of a word are the tokens 0, 2, 1, 3 of four
      const uint32_t word = load<uint32_t>(t.values[0] + 4 * i);
      int8_t* first = level + *at++;
      first[0] = int8_t(word);
      first[2 * dim] = int8_t(word >> 8);
      first[dim] = int8_t(word >> 16);
      first[3 * dim] = int8_t(word >> 24);
    }
    for (int token = 0; token < PAGE; ++token)
      for (int i = 0; i < dim; ++i) v[token * dim + i] = s.v_scales[token] * (c.v.unit * float(level[token * dim + i]));
  }
};

}  // namespace forge
