// encode: 64 rotated tokens of one KV head to one page record.
//
// Grid: pages x kv_heads threadgroups of 128 threads. A lane quantises one unit of 32 codes at a time, in the order of
// the record.
//
// Limited by instructions: about 40 per scalar code; a trellis code costs a Viterbi search from each of its 4 or 8
// states and one more to trace the best, 5 x 72 or 9 x 96 instructions, that is 3 or 7 us per page and head of
// head_dim 128 on an M4 (1.9e12 lane instructions a second), once in 64 tokens; REFINE multiplies this by 7. Bytes:
// 64 KB read and 6.5 KB written, 0.6 us at 120 GB/s.
//
// Codes must not depend on the system that a record is made on: functions that decide one are Metal's precise ones.
// MLX asks for fast ones (no option) on macOS 15 and later and for precise ones before.
//
// SHAPED keys (codec/shaping.py) are coded one channel quarter after another, each token by one thread: at head_dim 128
// a token takes 18,000 instructions for what earlier quarters feed back, 80,000 for four searches in which 8 survivors
// carry 32 errors and 25,000 for their starts. With REFINE that is 40 us per page and head on an M4, 10 ms for 32
// layers of 8 heads once in 64 tokens. Device memory beside the record, of one page and head: 40 KB.

#include "page.metal"

namespace forge {

enum ScaleRule { UNBIASED = 0, LEAST_SQUARES = 1, NORM = 2 };
enum { NOT_FINITE = 1, TOO_LARGE = 2 };

// The subset c1 c0 of the step from `state` with path bit u (codec/codebook.py, TRELLIS_TAPS).
template <int STATES>
inline int trellis_subset(int state, int u) {
  const uint path = uint(state << 1 | u);
  const uint h1 = STATES == 4 ? 5 : 11, h0 = STATES == 4 ? 2 : 4;
  return int((popcount(path & h1) & 1) << 1 | (popcount(path & h0) & 1));
}

// The nearest level of a subset: its level bits w; `distance` is squared.
template <int BITS>
inline int nearest_in_subset(float x, int subset, threadgroup const float* levels, thread float& distance) {
  int w = 0;
  distance = INFINITY;
  for (int i = 0; i < 1 << (BITS - 1); ++i) {
    const float d = x - levels[i << 2 | subset], d2 = d * d;
    if (d2 < distance) distance = d2, w = i;
  }
  return w;
}

// Least cost of a path from `start` back to itself; choice[s], bit i: the upper predecessor of state s at step i.
template <int BITS, int STATES>
inline float viterbi(thread const float (&x)[32], int start, threadgroup const float* levels,
                     thread uint (&choice)[STATES]) {
  float cost[STATES];
  for (int s = 0; s < STATES; ++s) cost[s] = s == start ? 0.0f : INFINITY, choice[s] = 0;
  for (int i = 0; i < 32; ++i) {
    float distance[4], next[STATES];
    for (int c = 0; c < 4; ++c) nearest_in_subset<BITS>(x[i], c, levels, distance[c]);
    for (int s = 0; s < STATES; ++s) {
      const int low = s >> 1, high = low + STATES / 2;
      const float a = cost[low] + distance[trellis_subset<STATES>(low, s & 1)];
      const float b = cost[high] + distance[trellis_subset<STATES>(high, s & 1)];
      next[s] = b < a ? b : a;
      choice[s] |= uint(b < a) << i;
    }
    for (int s = 0; s < STATES; ++s) cost[s] = next[s];
  }
  float end = cost[0];
  for (int s = 1; s < STATES; ++s) end = s == start ? cost[s] : end;
  return end;
}

// Codes of 32 values of unit variance, and the values they stand for in place of x.
template <int BITS, int STATES>
inline void quantise_path(thread float (&x)[32], threadgroup const float* levels, thread uint (&codes)[32]) {
  uint choice[STATES];
  float least = INFINITY;
  int start = 0;
  for (int s = 0; s < STATES; ++s) {
    const float cost = viterbi<BITS, STATES>(x, s, levels, choice);
    if (cost < least) least = cost, start = s;
  }
  viterbi<BITS, STATES>(x, start, levels, choice);
  int state = start;
  for (int i = 31; i >= 0; --i) {
    uint taken = choice[0];
    for (int s = 1; s < STATES; ++s) taken = s == state ? choice[s] : taken;
    const int u = state & 1, before = (state >> 1) + (taken >> i & 1 ? STATES / 2 : 0);
    const int subset = trellis_subset<STATES>(before, u);
    float distance;
    const int w = nearest_in_subset<BITS>(x[i], subset, levels, distance);
    codes[i] = uint(w << 1 | u);
    x[i] = levels[w << 2 | subset];
    state = before;
  }
}

template <int BITS, int CODE>
inline void quantise_unit(thread float (&x)[32], threadgroup const float* levels, thread uint (&codes)[32]) {
  if (CODE == TRELLIS4) {
    quantise_path<BITS, 4>(x, levels, codes);
  } else if (CODE == TRELLIS8) {
    quantise_path<BITS, 8>(x, levels, codes);
  } else {
    for (int i = 0; i < 32; ++i) {
      uint code = 0;
      for (int k = 0; k + 1 < 1 << BITS; ++k) code += x[i] > 0.5f * (levels[k] + levels[k + 1]) ? 1 : 0;
      codes[i] = code;
      x[i] = levels[code];
    }
  }
}

// The 32 codes 4 e + n to the words of a unit; the inverse of unit_nibbles (format.h).
template <int BITS, int CODE>
inline void pack_unit(thread const uint (&codes)[32], thread uint (&w)[BITS]) {
  uint n[4] = {0, 0, 0, 0};
  for (int i = 0; i < 32; ++i) n[i % 4] |= codes[i] << (4 * (i / 4));
  if (BITS == 4) {
    for (int k = 0; k < BITS; ++k) w[k] = n[k];
  } else if (CODE != SCALAR) {
    for (int k = 0; k < BITS; ++k) w[k] = 0;
    for (int k = 0; k < 4; ++k) {
      const uint level = n[k] >> 1;
      w[0] |= (n[k] & 0x11111111u) << k;
      if (BITS == 2)
        w[1] |= (level & 0x11111111u) << k;
      else
        w[1 + k % 2] |= (level & 0x33333333u) << (k < 2 ? 2 : 0);
    }
  } else if (BITS == 2) {
    w[0] = n[0] | n[1] << 2;
    w[1] = n[2] | n[3] << 2;
  } else {
    for (int k = 0; k < 3; ++k) w[k] = n[k] | (n[3] >> k & 0x11111111u) << 3;
  }
}

// How keys are shaped (codec/shaping.py), for one head, and what it takes in device memory; channels side by side by
// token.
struct Shape {
  const device float* factor;  // [orders, D, D]
  const device float* weight;  // [orders, D]
  const device uchar* orders;  // [64], of each token (codec/packing.py, key_orders)
  device float* errors;        // [D, 64]
  device uchar* codes;         // [D, 64], code and level index << 4

  const device float* row(int dim, int token, int channel) const {
    return factor + (long(orders[token]) * dim + channel) * dim;
  }
};

// Codes every token of a side at `factor` times its unit variance. y: [64, D] f32; row: [D] f32, subtracted from every
// token (zeros for values); rms, factor: [64]. sums: [4, 64, 2], by simdgroup <u, c> and <c, c> of each token, u the
// token at unit variance and c its code values. part: takes the codes if `write`. shape: with SHAPED and if `shaped`,
// where the codes are found. A barrier must follow.
template <int D, int BITS, int CODE, bool KEYS, bool SHAPED>
inline void code_side(const device float* y, threadgroup const float* row, threadgroup const float* levels,
                      device uint* part, threadgroup const float* rms, threadgroup const float* factor,
                      threadgroup float* sums, Shape shape, bool write, bool shaped, uint simdgroup, uint lane) {
  for (int i = int(lane); i < 2 * PAGE; i += 32) sums[int(simdgroup) * 2 * PAGE + i] = 0.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int unit = int(simdgroup); unit < units(D); unit += 4) {
    float x[32], u[32];
    uint codes[32];
    for (int i = 0; i < 32; ++i) {
      const int n = i % 4, e = i / 4;
      const int token = KEYS ? k_token(D, int(lane), unit, n) : v_token(int(lane), n, e);
      const int channel = KEYS ? k_channel(D, int(lane), unit, n, e) : v_channel(int(lane), unit, e);
      const float size = rms[token];
      u[i] = size > 0.0f ? (y[token * D + channel] - row[channel]) / size : 0.0f;
      x[i] = u[i] * factor[token];
      if (SHAPED && shaped) {
        const uint found = shape.codes[channel * PAGE + token];
        codes[i] = found & 15;
        x[i] = levels[found >> 4];
      }
    }
    if (!SHAPED || !shaped) quantise_unit<BITS, CODE>(x, levels, codes);
    if (write) {
      uint w[BITS];
      pack_unit<BITS, CODE>(codes, w);
      for (int k = 0; k < BITS; ++k) part[word_index(D, BITS, int(lane), unit, k)] = w[k];
    }
    // a nibble word of keys is one token's, over the lanes t; values are four tokens of two channels, over the lanes g
    for (int n = 0; n < 4; ++n) {
      for (int k = 0; k < (KEYS ? 1 : 4); ++k) {
        float uc = 0.0f, cc = 0.0f;
        for (int e = k; e < 8; e += KEYS ? 1 : 4) {
          const int i = 4 * e + n;
          uc += u[i] * x[i];
          cc += x[i] * x[i];
        }
        for (int mask = KEYS ? 1 : 4; mask < (KEYS ? 4 : 32); mask *= 2) {
          uc += simd_shuffle_xor(uc, ushort(mask));
          cc += simd_shuffle_xor(cc, ushort(mask));
        }
        if (KEYS ? (lane & 3) != 0 : lane >> 2 != 0) continue;
        const int token = KEYS ? k_token(D, int(lane), unit, n) : v_token(int(lane), n, k);
        sums[(int(simdgroup) * PAGE + token) * 2] += uc;
        sums[(int(simdgroup) * PAGE + token) * 2 + 1] += cc;
      }
    }
  }
}

// The state in which a path starts and ends: that of the cheapest survivor of two laps around the circle, from its
// middle, when it last passed the start.
template <int BITS, int STATES>
inline int circular_start(thread const float (&x)[32], threadgroup const float* levels) {
  float cost[STATES];
  int origin[STATES];
  for (int s = 0; s < STATES; ++s) cost[s] = 0.0f, origin[s] = s;
  for (int lap = 0; lap < 64; ++lap) {
    const int i = (lap + 16) % 32;
    float distance[4], next[STATES];
    int from[STATES];
    for (int c = 0; c < 4; ++c) nearest_in_subset<BITS>(x[i], c, levels, distance[c]);
    for (int s = 0; s < STATES; ++s) {
      const int low = s >> 1, high = low + STATES / 2;
      const float a = cost[low] + distance[trellis_subset<STATES>(low, s & 1)];
      const float b = cost[high] + distance[trellis_subset<STATES>(high, s & 1)];
      next[s] = b < a ? b : a;
      from[s] = lap < 48 ? s : b < a ? origin[high] : origin[low];
    }
    for (int s = 0; s < STATES; ++s) cost[s] = next[s], origin[s] = from[s];
  }
  int start = origin[0];
  float least = cost[0];
  for (int s = 1; s < STATES; ++s) {
    if (cost[s] < least) least = cost[s], start = origin[s];
  }
  return start;
}

// The factors of `Shape` between the 32 codes of one unit of keys. A class and no lambda, which MSL has since 3.2 only.
template <int D>
struct UnitFeedback {
  Shape shape;
  int unit, lane;

  // Factor of the error of code j in code i; 0 if they are of different tokens.
  float before(int i, int j) const {
    const int token = k_token(D, lane, unit, i % 4);
    if (token != k_token(D, lane, unit, j % 4)) return 0.0f;
    return shape.row(D, token, k_channel(D, lane, unit, i % 4, i / 4))[k_channel(D, lane, unit, j % 4, j / 4)];
  }
  float weight(int i) const {
    const int token = k_token(D, lane, unit, i % 4);
    return shape.weight[shape.orders[token] * D + k_channel(D, lane, unit, i % 4, i / 4)];
  }
};

// Codes of a unit on a path from `start` back to it, each survivor with the errors of its own path fed back. x: the
// unit, base: what earlier units feed back; feedback: a UnitFeedback. found: code and level index << 4; x becomes its
// errors.
template <int BITS, int STATES, class Feedback>
inline void shaped_path(thread float (&x)[32], thread const float (&base)[32], int start,
                        threadgroup const float* levels, Feedback feedback, thread uint (&found)[32]) {
  float cost[STATES], error[2][STATES][32];
  uint level[2][STATES][32];
  for (int s = 0; s < STATES; ++s) cost[s] = s == start ? 0.0f : INFINITY;
  for (int i = 0; i < 32; ++i) {
    const int now = i & 1;
    float target[STATES], next[STATES];
    const float weight = feedback.weight(i);
    for (int s = 0; s < STATES; ++s) target[s] = x[i] + base[i];
    for (int j = 0; j < i; ++j) {
      const float f = feedback.before(i, j);
      for (int s = 0; s < STATES; ++s) target[s] += f * error[now][s][j];
    }
    for (int s = 0; s < STATES; ++s) {
      const int low = s >> 1, high = low + STATES / 2;
      const int kind[2] = {trellis_subset<STATES>(low, s & 1), trellis_subset<STATES>(high, s & 1)};
      float distance[2];
      const int w[2] = {nearest_in_subset<BITS>(target[low], kind[0], levels, distance[0]),
                        nearest_in_subset<BITS>(target[high], kind[1], levels, distance[1])};
      const float a = cost[low] + weight * distance[0], b = cost[high] + weight * distance[1];
      const int pick = b < a ? 1 : 0, from = pick ? high : low, index = w[pick] << 2 | kind[pick];
      next[s] = pick ? b : a;
      for (int j = 0; j < i; ++j)
        error[now ^ 1][s][j] = error[now][from][j], level[now ^ 1][s][j] = level[now][from][j];
      error[now ^ 1][s][i] = x[i] - levels[index];
      level[now ^ 1][s][i] = uint(index << 4 | w[pick] << 1 | (s & 1));
    }
    for (int s = 0; s < STATES; ++s) cost[s] = next[s];
  }
  for (int i = 0; i < 32; ++i) x[i] = error[0][start][i], found[i] = level[0][start][i];
}

// Codes keys with feedback into shape.codes; y, row, levels, rms, factor as in code_side. A thread codes the same
// tokens from their first channel to their last, so that none waits for another.
template <int D, int BITS, int CODE>
inline void shape_keys(const device float* y, threadgroup const float* row, threadgroup const float* levels,
                       threadgroup const float* rms, threadgroup const float* factor, Shape shape, int me) {
  const int steps = D / 32, run = steps % 4 == 0 ? steps / 4 : steps % 2 == 0 ? steps / 2 : steps;
  const int chains = units(D) / run;  // units of a lane that begin with a token
  if (me >= 8 * chains) return;
  for (int first = 0; first < run; ++first) {
    for (int n = 0; n < 4; ++n) {
      const int token = k_token(D, (me & 7) * 4, (me >> 3) * run + first, n);
      for (int c = 0; c < D; ++c) shape.errors[c * PAGE + token] = 0.0f;
    }
  }
  for (int t = 0; t < 4; ++t) {
    for (int first = 0; first < run; ++first) {
      const int unit = (me >> 3) * run + first, lane = (me & 7) * 4 + t;
      float x[32], base[32];
      uint found[32];
      for (int i = 0; i < 32; ++i) {
        const int token = k_token(D, lane, unit, i % 4), channel = k_channel(D, lane, unit, i % 4, i / 4);
        const device float* f = shape.row(D, token, channel);
        x[i] = rms[token] > 0.0f ? (y[token * D + channel] - row[channel]) / rms[token] * factor[token] : 0.0f;
        base[i] = 0.0f;
        // what this quarter of the channels has coded so far is of other units, or still zero
        for (int j = 0; j < (run > 1 ? t + 1 : t) * (D / 4); ++j) base[i] += f[j] * shape.errors[j * PAGE + token];
      }
      const UnitFeedback<D> feedback = {shape, unit, lane};
      if (CODE == SCALAR) {
        for (int i = 0; i < 32; ++i) {
          float target = x[i] + base[i];
          for (int j = 0; j < i; ++j) target += feedback.before(i, j) * x[j];
          uint code = 0;
          for (int k = 0; k + 1 < 1 << BITS; ++k) code += target > 0.5f * (levels[k] + levels[k + 1]) ? 1 : 0;
          x[i] -= levels[code];
          found[i] = code << 4 | code;
        }
      } else {
        enum { STATES = CODE == TRELLIS4 ? 4 : 8 };
        float shifted[32];
        for (int i = 0; i < 32; ++i) shifted[i] = x[i] + base[i];
        const int start = circular_start<BITS, STATES>(shifted, levels);
        shaped_path<BITS, STATES>(x, base, start, levels, feedback, found);
      }
      for (int i = 0; i < 32; ++i) {
        const int token = k_token(D, lane, unit, i % 4), channel = k_channel(D, lane, unit, i % 4, i / 4);
        shape.errors[channel * PAGE + token] = x[i];
        shape.codes[channel * PAGE + token] = uchar(found[i]);
      }
    }
  }
}

// e^T H e of a token whose code values times `gain` stand for it; its thread's alone.
template <int D>
inline float shaped_error(const device float* y, threadgroup const float* row, threadgroup const float* levels,
                          float size, float gain, Shape shape, int token) {
  for (int c = 0; c < D; ++c) {
    const float u = size > 0.0f ? (y[token * D + c] - row[c]) / size : 0.0f;
    shape.errors[c * PAGE + token] = u - gain * levels[shape.codes[c * PAGE + token] >> 4];
  }
  float total = 0.0f;
  for (int c = 0; c < D; ++c) {
    const device float* f = shape.row(D, token, c);
    float sum = 0.0f;
    for (int j = 0; j < D; ++j) sum += f[j] * shape.errors[j * PAGE + token];
    total += shape.weight[shape.orders[token] * D + c] * sum * sum;
  }
  return total;
}

// <u, c> and <c, c> of a token, over the simdgroups.
inline float2 token_sums(threadgroup const float* sums, int token) {
  float2 total = float2(0.0f);
  for (int k = 0; k < 4; ++k) total += float2(sums[(k * PAGE + token) * 2], sums[(k * PAGE + token) * 2 + 1]);
  return total;
}

// The scale of a token in units of its root mean square; uu = <u, u>.
template <int RULE>
inline float token_gain(float uu, float2 s) {
  if (RULE == NORM) return precise::sqrt(uu / s.y);
  if (RULE == LEAST_SQUARES) return s.x / s.y;
  return uu / (s.x > 0.0f ? s.x : 1.0f);
}

// Number of the group of a token; tokens of a group share trellis paths and are refined together.
template <int D, int CODE, bool KEYS>
inline int path_group(int token) {
  if (CODE == SCALAR) return token;
  if (!KEYS) return token >> 4;
  const int steps = D / 32, tokens = steps == 2 ? 2 : steps == 3 ? 4 : 1;
  return (((token >> 4) * 2 + (token & 1)) * 8 + (token % 16 >> 1)) / tokens;
}

// Multiple of its own scale at which a token is coded again in round 1 to 5.
inline float multiplier(int round) { return 0.85f + 0.05f * float(round); }

// Codes and scales of one side of a page; y, row, part as in code_side.
// scales: [64] f32, the result. rms, factor: [64], sums: [4, 64, 2] f32 scratch. Ends with a barrier.
// `refine` codes every token at its own scale and at five nearby ones, and keeps, group by group, what leaves the least
// squared error. `shaped`, with SHAPED, codes with feedback, and the error is the shaped one. Both are known at run
// time only, and a round that tries shares its code with the last one, which writes: a side is compiled once.
template <int D, int BITS, int CODE, bool KEYS, int RULE, bool SHAPED>
inline void quantise_side(const device float* y, threadgroup const float* row, threadgroup const float* levels,
                          device uint* part, threadgroup float* rms, threadgroup float* factor, threadgroup float* sums,
                          threadgroup float* scales, Shape shape, bool refine, bool shaped, uint simdgroup, uint lane) {
  const int me = int(simdgroup * 32 + lane), rounds = refine ? 6 : 0;
  for (int token = int(simdgroup); token < PAGE; token += 4) {
    float square = 0.0f;
    for (int c = int(lane); c < D; c += 32) {
      const float x = y[token * D + c] - row[c];
      square += x * x;
    }
    square = simd_sum(square);
    if (lane == 0) rms[token] = precise::sqrt(square / float(D)), factor[token] = 1.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float uu = me < PAGE && rms[me] > 0.0f ? float(D) : 0.0f;
  float least = INFINITY, best = 1.0f, fit = 1.0f;
  for (int round = 0; round <= rounds; ++round) {
    const bool last = round == rounds;
    if (SHAPED && shaped) {
      shape_keys<D, BITS, CODE>(y, row, levels, rms, factor, shape, me);
      threadgroup_barrier(mem_flags::mem_device);
    }
    code_side<D, BITS, CODE, KEYS, SHAPED>(y, row, levels, part, rms, factor, sums, shape, last, shaped, simdgroup,
                                           lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (last) break;
    if (me < PAGE) {
      const float2 s = token_sums(sums, me);
      const float gain = token_gain<RULE>(uu, s);
      if (round == 0 && s.x > 0.0f) fit = s.y / s.x;
      scales[me] = SHAPED && shaped ? shaped_error<D>(y, row, levels, rms[me], gain, shape, me)
                                    : uu - 2.0f * gain * s.x + gain * gain * s.y;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (me < PAGE) {
      float error = 0.0f;
      for (int token = 0; token < PAGE; ++token) {
        if (path_group<D, CODE, KEYS>(token) == path_group<D, CODE, KEYS>(me)) error += scales[token];
      }
      if (error < least) least = error, best = factor[me];
      factor[me] = round < 5 ? fit * multiplier(round + 1) : best;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | (SHAPED ? mem_flags::mem_device : mem_flags::mem_none));
  }
  if (me < PAGE) scales[me] = rms[me] * token_gain<RULE>(uu, token_sums(sums, me));
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The smallest exponent with which every scale times `margin` of a page has a log8 code (codec/packing.py, log8_base).
inline int log8_base(threadgroup const float* scales, float margin, uint lane) {
  const float top = simd_max(max(scales[lane], scales[lane + 32])) * margin;
  return top > 0.0f ? int(clamp(ceil(precise::log2(top) - 254.5f / float(LOG8_STEPS)), -128.0f, 127.0f)) : 0;
}

inline uchar log8_code(float scale, int base) {
  if (!(scale >= precise::exp2(float(base - 1)))) return 0;
  return uchar(clamp(rint((precise::log2(scale) - float(base)) * float(LOG8_STEPS)) + 1.0f, 1.0f, 255.0f));
}

// The mean row of the page, int8 in float: [D] of row, in units of the step; its low bits hold `header` (format.h).
template <int D>
inline void make_row(threadgroup const float* mean, float step, uint header, threadgroup float* row, int thread_index) {
  for (int c = thread_index; c < D; c += 128) {
    // a step that is subnormal in fp16 can be rounded far down
    const float x = step > 0.0f ? clamp(mean[c] / step, -127.0f, 127.0f) : mean[c];
    float nearest = rint(x);
    if (c < 32) {
      const float bit = float(header >> c & 1);
      nearest = rint((x - bit) * 0.5f) * 2.0f + bit;
      if (nearest > 127.0f) nearest -= 2.0f;
    }
    row[c] = nearest;
  }
}

// Writes the scales of one side.
template <int SCALES>
inline void store_scales(threadgroup const float* scales, int base, device uchar* part, int thread_index) {
  if (thread_index >= PAGE) return;
  if (SCALES == FP16)
    ((device half*)part)[thread_index] = half(scales[thread_index]);
  else
    part[thread_index] = log8_code(scales[thread_index], base);
}

// Floats of threadgroup memory: mean, row, scaled row, zeros [D] each; levels [2, 16]; rms, factor [64]; sums
// [4, 64, 2]; scales [64].
constexpr int encode_scratch(int dim) { return 4 * dim + 32 + 11 * PAGE; }

// y_k, y_v: [kv_heads, tokens, D] f32, rotated; k_levels, v_levels: [16] f32; shape: of this page and head, with
// SHAPED. records: [pages, kv_heads, BYTES] u8; status: [pages, kv_heads] u32, NOT_FINITE and TOO_LARGE bits.
template <class P, int K_RULE, int V_RULE, bool KEY_MEAN, bool REFINE, bool SHAPED>
inline void encode(const device float* y_k, const device float* y_v, int tokens, const device float* k_levels,
                   const device float* v_levels, Shape shape, device uchar* records, device uint* status,
                   threadgroup float* scratch, uint3 group, uint3 groups, uint simdgroup, uint lane) {
  const bool fp16_scales = int(P::SCALES) == int(FP16);
  const int page = int(group.x), head = int(group.y), me = int(simdgroup * 32 + lane);
  const long slot = long(page) * groups.y + head;
  const device float* keys = y_k + (long(head) * tokens + page * PAGE) * P::D;
  const device float* values = y_v + (long(head) * tokens + page * PAGE) * P::D;
  device uchar* record = records + slot * P::BYTES;
  threadgroup float* mean = scratch;
  threadgroup float* row = mean + P::D;
  threadgroup float* scaled = row + P::D;
  threadgroup float* zeros = scaled + P::D;
  threadgroup float* levels = zeros + P::D;
  threadgroup float* rms = levels + 32;
  threadgroup float* factor = rms + PAGE;
  threadgroup float* sums = factor + PAGE;
  threadgroup float* scales = sums + 8 * PAGE;

  bool finite = true;
  for (int c = me; c < P::D; c += 128) {
    float sum = 0.0f;
    for (int token = 0; token < PAGE; ++token) {
      const float x = keys[token * P::D + c];
      sum += x;
      finite = finite && isfinite(x) && isfinite(values[token * P::D + c]);
    }
    mean[c] = KEY_MEAN ? sum / float(PAGE) : 0.0f;
    zeros[c] = 0.0f;
  }
  if (me < 32) levels[me] = me < 16 ? k_levels[me] : v_levels[me - 16];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float top = 0.0f;
  for (int c = int(lane); c < P::D; c += 32) top = max(top, abs(mean[c]));
  const float step = float(half(simd_max(top) / 126.5f));

  quantise_side<P::D, P::V_BITS, P::V_CODE, false, V_RULE, false>(values, zeros, levels + 16,
                                                                  (device uint*)(record + P::V_CODES), rms, factor,
                                                                  sums, scales, shape, REFINE, false, simdgroup, lane);
  bool fits = isfinite(step);
  int v_exponent = 0, k_exponent = 0;
  if (!fp16_scales) v_exponent = log8_base(scales, 1.0f, lane);
  if (me < PAGE) fits = fits && isfinite(fp16_scales ? float(half(scales[me])) : scales[me]);
  store_scales<P::SCALES>(scales, v_exponent, record + P::V_SCALES, me);

  // The exponent of the keys' log8 scales is part of the row that keys are coded against: it is guessed from plain
  // codes against the row without it, with a margin for refinement and the row, and raised where a scale does not fit.
  bool guess = !fp16_scales;
  while (true) {
    const uint bits = uint(as_type<ushort>(half(step))) | uint(k_exponent & 255) << 16 | uint(v_exponent & 255) << 24;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    make_row<P::D>(mean, step, bits, row, me);
    for (int c = me; c < P::D; c += 128) scaled[c] = row[c] * step;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    quantise_side<P::D, P::K_BITS, P::K_CODE, true, K_RULE, SHAPED>(keys, scaled, levels, (device uint*)record, rms,
                                                                    factor, sums, scales, shape, REFINE && !guess,
                                                                    !guess, simdgroup, lane);
    if (guess) {
      k_exponent = log8_base(scales, precise::exp2(REFINE ? 0.25f : 0.0625f), lane);
      guess = false;
      continue;
    }
    const int needed = log8_base(scales, 1.0f, lane);
    if (fp16_scales || needed <= k_exponent || k_exponent == 127) break;
    k_exponent = needed;
  }
  for (int c = me; c < P::D; c += 128) record[P::MEAN + c] = uchar(char(row[c]));
  if (me < PAGE) fits = fits && isfinite(fp16_scales ? float(half(scales[me])) : scales[me]);
  store_scales<P::SCALES>(scales, k_exponent, record + P::K_SCALES, me);

  const uint flags = simd_or((finite ? 0u : uint(NOT_FINITE)) | (fits ? 0u : uint(TOO_LARGE)));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) sums[simdgroup] = float(flags);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (me == 0) status[slot] = uint(sums[0]) | uint(sums[1]) | uint(sums[2]) | uint(sums[3]);
}

}  // namespace forge

//! body
threadgroup float scratch[forge::encode_scratch(D)];
const int head = int(threadgroup_position_in_grid.y), size = k_factor_shape[1] * D;
const int own = k_factor_shape[0] > 1 ? head : 0;
const long slot = SHAPED ? long(threadgroup_position_in_grid.x) * threadgroups_per_grid.y + head : 0;
if (!SHAPED && thread_position_in_grid.x < 8 && head == 0) {  // placeholders
  errors[thread_position_in_grid.x] = 0.0f;
  codes[thread_position_in_grid.x] = 0;
}
const forge::Shape shape = {k_factor + long(own) * size * D, k_weight + long(own) * size, orders,
                            errors + slot * forge::PAGE * D, codes + slot * forge::PAGE * D};
forge::encode<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, K_RULE, V_RULE, KEY_MEAN, REFINE, SHAPED>(
    y_k, y_v, y_k_shape[1], k_levels, v_levels, shape, records, status, scratch, threadgroup_position_in_grid,
    threadgroups_per_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
