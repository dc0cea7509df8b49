// Which codes a vector gets: trellis paths of least squared error, and codes with feedback (codec/shaping.py), where
// each channel makes up for the errors of the channels before it.
#pragma once

#include "numbers.h"

namespace forge {

// Units of keys that lie on the same channels of different tokens are searched side by side. In arrays [dim][64] of
// this file the tokens stand in that order: column (local * chains + chain) * 8 + g is token (g >> 1) 16 + 2 (chain *
// tokens + local) + (g & 1). The rows are a token's channels in the order in which paths visit them (codec/packing.py,
// key_orders).
struct KeyOrder {
  int steps;                     // nibble words of a token in a lane
  int run, tokens;               // units and tokens until a unit begins with a token
  int chains;                    // runs that the eight tokens of one g make
  int orders, order[4];          // order of each local token
  uint16_t channel[4][MAX_DIM];  // by order and rank
  explicit KeyOrder(int dim);
  FORGE_INLINE int local(int column) const { return column / 8 / chains; }
  FORGE_INLINE int token(int column) const {
    const int g = column & 7, chain = column / 8 % chains;
    return (g >> 1) * 16 + 2 * (chain * tokens + local(column)) + (g & 1);
  }
  FORGE_INLINE int group(int column) const { return column % (8 * chains); }
  FORGE_INLINE const uint16_t* channels(int column) const { return channel[order[local(column)]]; }
};
const KeyOrder& key_order(int dim);

FORGE_INLINE Feedback feedback_of(const Codec& c, int head) {
  if (c.k_factor.empty()) return {nullptr, nullptr};
  const size_t size = size_t(key_order(c.dim).orders) * c.dim, h = c.k_weight.size() == size ? 0 : size_t(head);
  return {c.k_factor.data() + h * size * c.dim, c.k_weight.data() + h * size};
}

template <class Isa>
struct Search {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  using U32 = typename Isa::U32;
  static constexpr int W = Isa::WORDS;

  // Codes of W paths of least squared error, x at `stride` floats a step. A path is a circle of states: the first pass
  // finds the state from which the best circle starts, the second follows that circle (Viterbi 1967).
  template <int STATES, int BITS>
  static void viterbi(const float* x, int stride, const float* values, uint8_t* codes) {
    F32 best[32][4];  // least squared error of each subset of levels
    U32 history[32];  // from bit 8 on two bits for the level bits of each subset; below, bit s: which predecessor of s
    F32 cost[STATES][STATES];
    for (int a = 0; a < STATES; ++a)
      for (int s = 0; s < STATES; ++s) cost[a][s] = F32{} + (s == a ? 0.0f : INF);
    for (int t = 0; t < 32; ++t) {
      const F32 value = load<F32>(x + t * stride);
      history[t] = U32{};
      for (int subset = 0; subset < 4; ++subset) {
        F32 least = F32{} + INF;
        U32 pick = U32{};
        for (int w = 0; w < 1 << (BITS - 1); ++w) {
          const F32 d = value - values[w << 2 | subset], e = d * d;
          pick = e < least ? U32{} + uint32_t(w) : pick;
          least = e < least ? e : least;
        }
        best[t][subset] = least;
        history[t] |= pick << (8 + 2 * subset);
      }
      for (int start = 0; start < STATES; ++start) step<STATES>(cost[start], best[t], [](int, I32) {});
    }
    U32 state = U32{};
    F32 least = cost[0][0];
    for (int s = 1; s < STATES; ++s) {
      state = cost[s][s] < least ? U32{} + uint32_t(s) : state;
      least = cost[s][s] < least ? cost[s][s] : least;
    }
    for (int s = 0; s < STATES; ++s) cost[0][s] = state == U32{} + uint32_t(s) ? F32{} : F32{} + INF;
    for (int t = 0; t < 32; ++t)
      step<STATES>(cost[0], best[t], [&](int after, I32 second) { history[t] |= U32(second) & 1u << after; });
    for (int t = 31; t >= 0; --t) {
      const U32 u = state & 1u, before = state >> 1 | (history[t] >> state & 1u) * (STATES / 2);
      const U32 reg = before << 1 | u;
      const U32 c1 = STATES == 4 ? reg ^ reg >> 2 : reg ^ reg >> 1 ^ reg >> 3, c0 = reg >> (STATES == 4 ? 1 : 2);
      const U32 subset = (c1 & 1u) << 1 | (c0 & 1u);
      const U32 w = history[t] >> (8u + 2u * subset) & 3u;
      const U32 code = w << 1 | u;
      for (int i = 0; i < W; ++i) codes[t * stride + i] = uint8_t(code[i]);
      state = before;
    }
  }
  // One step of all states: chosen(state, mask of the lanes that come from the upper predecessor).
  template <int STATES, class F>
  static FORGE_INLINE void step(F32 (&cost)[STATES], const F32 (&best)[4], F chosen) {
    F32 next[STATES];
    for (int after = 0; after < STATES; ++after) {
      const int first = after >> 1, second = first | STATES / 2;
      const F32 a = cost[first] + best[subset_of(STATES, first << 1 | (after & 1))];
      const F32 b = cost[second] + best[subset_of(STATES, second << 1 | (after & 1))];
      chosen(after, I32(b < a));
      next[after] = b < a ? b : a;
    }
    for (int s = 0; s < STATES; ++s) cost[s] = next[s];
  }
  static constexpr int subset_of(int states, int reg) {
    const int c1 = states == 4 ? reg ^ reg >> 2 : reg ^ reg >> 1 ^ reg >> 3, c0 = states == 4 ? reg >> 1 : reg >> 2;
    return (c1 & 1) << 1 | (c0 & 1);
  }
  static void paths(const Side& side, const float* x, int stride, const float* values, uint8_t* codes) {
    if (side.bits == 3)
      side.states() == 4 ? viterbi<4, 3>(x, stride, values, codes) : viterbi<8, 3>(x, stride, values, codes);
    else
      side.states() == 4 ? viterbi<4, 2>(x, stride, values, codes) : viterbi<8, 2>(x, stride, values, codes);
  }

  // Levels of a trellis by subset, ascending, and the borders between them.
  template <int BITS>
  struct Subsets {
    static constexpr int COUNT = 1 << (BITS - 1);
    float value[4][COUNT], border[4][COUNT - 1];
    explicit Subsets(const float* values) {
      for (int s = 0; s < 4; ++s)
        for (int w = 0; w < COUNT; ++w) {
          value[s][w] = values[w << 2 | s];
          if (w) border[s][w - 1] = 0.5f * (value[s][w - 1] + value[s][w]);
        }
    }
    FORGE_INLINE F32 nearest(int s, F32 x) const {
      F32 v = F32{} + value[s][0];
      for (int w = 1; w < COUNT; ++w) v = x > border[s][w - 1] ? F32{} + value[s][w] : v;
      return v;
    }
    FORGE_INLINE U32 index(int s, F32 x) const {
      U32 n = U32{};
      for (int w = 1; w < COUNT; ++w) n += U32(x > border[s][w - 1]) & 1u;
      return n;
    }
  };

  // The state in which the best circle starts, nearly: that of the cheapest survivor of two laps from the middle.
  template <int STATES, int BITS>
  static U32 circular_start(const F32 (&x)[32], const Subsets<BITS>& levels) {
    F32 best[32][4], cost[STATES] = {};
    for (int e = 0; e < 32; ++e)
      for (int s = 0; s < 4; ++s) {
        const F32 d = x[e] - levels.nearest(s, x[e]);
        best[e][s] = d * d;
      }
    for (int i = 16; i < 64; ++i) step<STATES>(cost, best[i & 31], [](int, I32) {});
    U32 origin[STATES], next[STATES];
    for (int s = 0; s < STATES; ++s) origin[s] = U32{} + uint32_t(s);
    for (int i = 0; i < 16; ++i) {
      step<STATES>(cost, best[i], [&](int after, I32 upper) {
        next[after] = upper ? origin[after >> 1 | STATES / 2] : origin[after >> 1];
      });
      for (int s = 0; s < STATES; ++s) origin[s] = next[s];
    }
    U32 state = origin[0];
    F32 least = cost[0];
    for (int s = 1; s < STATES; ++s) {
      state = cost[s] < least ? origin[s] : state;
      least = cost[s] < least ? cost[s] : least;
    }
    return state;
  }

  // How a unit of keys is coded: of each code in turn the rank of its channel, the columns of its token, its weight,
  // and the factors of those codes before it (`prior`) that are of the same token.
  struct Unit {
    int rank[32], before[32], column[32], priors[32], prior[32][32];
    float weight[32], inside[32][32];
    const float* factor[32];  // row of the channel: [before] factors of what earlier units coded
  };

  // Keys x on trellis paths with feedback; errors (x less its level) and codes, all [dim][64] by ranks and columns.
  // Every survivor of a search carries the errors of its own path.
  template <int STATES, int BITS>
  static void shaped_paths(int dim, const float* x, const Feedback& feedback, const float* values, float* error,
                           uint8_t* codes) {
    const KeyOrder& order = key_order(dim);
    const Subsets<BITS> levels(values);
    for (int t = 0; t < 4; ++t) {
      int coded[4];  // ranks of each local token so far
      for (int& rank : coded) rank = t * (dim / 4);
      for (int first = 0; first < order.run; ++first) {
        Unit unit;
        int before[4];
        __builtin_memcpy(before, coded, sizeof(before));
        for (int e = 0; e < 32; ++e) {
          const int local = (4 * first + e % 4) / order.steps, o = order.order[local];
          unit.rank[e] = coded[local]++;
          unit.before[e] = before[local];
          unit.column[e] = local * order.chains * 8;
          unit.weight[e] = feedback.weight[o * dim + unit.rank[e]];
          unit.factor[e] = feedback.factor + (size_t(o) * dim + unit.rank[e]) * dim;
          unit.priors[e] = 0;
          for (int j = 0; j < e; ++j)
            if (unit.column[j] == unit.column[e]) {
              unit.inside[e][unit.priors[e]] = unit.factor[e][unit.rank[j]];
              unit.prior[e][unit.priors[e]++] = j;
            }
        }
        for (int row = 0; row < 8 * order.chains; row += W) {
          F32 target[32], shifted[32];
          for (int e = 0; e < 32; ++e) {
            F32 sum = F32{};
            for (int j = 0; j < unit.before[e]; ++j)
              sum += unit.factor[e][j] * load<F32>(error + j * PAGE + unit.column[e] + row);
            target[e] = load<F32>(x + unit.rank[e] * PAGE + unit.column[e] + row);
            shifted[e] = target[e] + sum;
          }
          const U32 start = circular_start<STATES, BITS>(shifted, levels);
          U32 upper[32];
          survivors<STATES, BITS>(target, shifted, unit, levels, start, upper);
          U32 state = start, bit[32], subset[32];
          for (int e = 31; e >= 0; --e) {
            bit[e] = state & 1u;
            state = state >> 1 | (upper[e] >> state & 1u) * (STATES / 2);
            const U32 reg = state << 1 | bit[e];
            const U32 c1 = STATES == 4 ? reg ^ reg >> 2 : reg ^ reg >> 1 ^ reg >> 3, c0 = reg >> (STATES == 4 ? 1 : 2);
            subset[e] = (c1 & 1u) << 1 | (c0 & 1u);
          }
          F32 found[32];
          for (int e = 0; e < 32; ++e) {
            F32 f = shifted[e];
            for (int j = 0; j < unit.priors[e]; ++j) f += unit.inside[e][j] * found[unit.prior[e][j]];
            F32 level = levels.nearest(0, f);
            U32 w = levels.index(0, f);
            for (uint32_t s = 1; s < 4; ++s) {
              level = subset[e] == s ? levels.nearest(int(s), f) : level;
              w = subset[e] == s ? levels.index(int(s), f) : w;
            }
            found[e] = target[e] - level;
            const int at = unit.rank[e] * PAGE + unit.column[e] + row;
            put(error + at, found[e]);
            const U32 code = w << 1 | bit[e];
            for (int i = 0; i < W; ++i) codes[at + i] = uint8_t(code[i]);
          }
        }
      }
    }
  }

  // Viterbi search from `start` back to it: bit s of upper[e] says that state s after step e comes from its upper
  // predecessor.
  template <int STATES, int BITS>
  static void survivors(const F32 (&target)[32], const F32 (&shifted)[32], const Unit& unit,
                        const Subsets<BITS>& levels, U32 start, U32 (&upper)[32]) {
    F32 carried[2][STATES][32];
    F32 cost[STATES], next[STATES];
    for (int s = 0; s < STATES; ++s) cost[s] = start == uint32_t(s) ? F32{} : F32{} + INF;
    for (int e = 0; e < 32; ++e) {
      const auto& before = carried[e & 1];
      auto& after = carried[~e & 1];
      F32 branch[STATES][2], left[STATES][2];
      for (int s = 0; s < STATES; ++s) {
        F32 f = shifted[e];
        for (int j = 0; j < unit.priors[e]; ++j) f += unit.inside[e][j] * before[s][unit.prior[e][j]];
        for (int u = 0; u < 2; ++u) {
          const F32 level = levels.nearest(subset_of(STATES, s << 1 | u), f), d = f - level;
          branch[s][u] = cost[s] + unit.weight[e] * (d * d);
          left[s][u] = target[e] - level;
        }
      }
      upper[e] = U32{};
      for (int s = 0; s < STATES; ++s) {
        const int u = s & 1, a = s >> 1, b = a | STATES / 2;
        const I32 second = branch[b][u] < branch[a][u];
        next[s] = second ? branch[b][u] : branch[a][u];
        upper[e] |= U32(second) & 1u << s;
        for (int j = 0; j < e; ++j) after[s][j] = second ? before[b][j] : before[a][j];
        after[s][e] = second ? left[b][u] : left[a][u];
      }
      for (int s = 0; s < STATES; ++s) cost[s] = next[s];
    }
  }

  // The same for scalar codes, all tokens in the first order.
  static void shaped_scalars(const Side& side, int dim, const float* x, const Feedback& feedback, const float* values,
                             float* error, uint8_t* codes) {
    for (int i = 0; i < dim; ++i)
      for (int column = 0; column < PAGE; column += W) {
        const F32 target = load<F32>(x + i * PAGE + column);
        F32 f = target, level = F32{} + values[0];
        for (int j = 0; j < i; ++j) f += feedback.factor[i * dim + j] * load<F32>(error + j * PAGE + column);
        U32 code = U32{};
        for (int l = 1; l < side.level_count(); ++l) {
          const I32 above = f > 0.5f * (values[l - 1] + values[l]);
          level = above ? F32{} + values[l] : level;
          code += U32(above) & 1u;
        }
        put(error + i * PAGE + column, target - level);
        for (int k = 0; k < W; ++k) codes[i * PAGE + column + k] = uint8_t(code[k]);
      }
  }
  static void shaped(const Side& side, int dim, const float* x, const Feedback& feedback, const float* values,
                     float* error, uint8_t* codes) {
    if (side.code == SCALAR) return shaped_scalars(side, dim, x, feedback, values, error, codes);
    if (side.bits == 3)
      side.states() == 4 ? shaped_paths<4, 3>(dim, x, feedback, values, error, codes)
                         : shaped_paths<8, 3>(dim, x, feedback, values, error, codes);
    else
      side.states() == 4 ? shaped_paths<4, 2>(dim, x, feedback, values, error, codes)
                         : shaped_paths<8, 2>(dim, x, feedback, values, error, codes);
  }

  // e^T H e of errors [dim][64], all in the first order, to out [64].
  static void energy(int dim, const float* error, const Feedback& feedback, float* out) {
    for (int column = 0; column < PAGE; column += W) {
      F32 sum = F32{};
      for (int i = 0; i < dim; ++i) {
        F32 z = load<F32>(error + i * PAGE + column);
        for (int j = 0; j < i; ++j) z += feedback.factor[i * dim + j] * load<F32>(error + j * PAGE + column);
        sum += feedback.weight[i] * (z * z);
      }
      put(out + column, sum);
    }
  }
};

}  // namespace forge
