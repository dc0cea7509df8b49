// encode: 64 rotated tokens of one KV head to one page record.
//
// Grid: pages x kv_heads threadgroups of 128 threads. A lane quantises one unit of 32 codes at a time, in the order of
// the record.
//
// Limited by instructions: about 40 per scalar code; a trellis code costs a Viterbi search from each of its 4 or 8 states
// and one more to trace the best, 5 x 72 or 9 x 96 instructions, that is 3 or 7 us per page and head of head_dim 128 on
// an M4 (1.9e12 lane instructions a second), once in 64 tokens. Bytes: 64 KB read and 6.5 KB written, 0.6 us at 120 GB/s.

#include "page.metal"

namespace fa {

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
inline float viterbi(thread const float (&x)[32], int start, threadgroup const float* levels, thread uint (&choice)[STATES]) {
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

// 32 codes to the words of a unit; the inverse of unit_nibbles (format.h).
template <int BITS, int CODE>
inline void pack_unit(thread const uint (&codes)[32], thread uint (&w)[BITS]) {
  uint n[4] = {0, 0, 0, 0};
  for (int i = 0; i < 32; ++i) n[i / 8] |= codes[i] << (4 * (i % 8));
  if (BITS == 4) {
    for (int k = 0; k < BITS; ++k) w[k] = n[k];
  } else if (BITS == 2) {
    w[0] = n[0] | n[1] << 2;
    w[1] = n[2] | n[3] << 2;
  } else if (CODE == SCALAR) {
    for (int k = 0; k < 3; ++k) w[k] = n[k] | (n[3] >> k & 0x11111111u) << 3;
  } else {
    for (int k = 0; k < 3; ++k) {
      w[k] = (n[k] & 0x66666666u) << 1 | (n[k] & 0x11111111u) | (n[3] >> (2 - k) & 0x11111111u) << 1;
    }
  }
}

// Quantises one side of a page.
// y: [64, D] f32; row: [D] f32, subtracted from every token (zeros for values); part: the side's codes in the record.
// rms: [64] f32, root mean square of each token, to be filled; sums: [4, 64, 2] f32 scratch.
// scales: [64] f32, the result. Ends with a barrier.
template <int D, int BITS, int CODE, bool KEYS, int RULE>
inline void quantise_side(const device float* y, threadgroup const float* row, threadgroup const float* levels,
                          device uint* part, threadgroup float* rms, threadgroup float* sums, threadgroup float* scales,
                          uint simdgroup, uint lane) {
  for (int token = int(simdgroup); token < PAGE; token += 4) {
    float square = 0.0f;
    for (int c = int(lane); c < D; c += 32) {
      const float x = y[token * D + c] - row[c];
      square += x * x;
    }
    square = simd_sum(square);
    if (lane == 0) rms[token] = sqrt(square / float(D));
  }
  for (int i = int(lane); i < 2 * PAGE; i += 32) sums[int(simdgroup) * 2 * PAGE + i] = 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int unit = int(simdgroup); unit < units(D); unit += 4) {
    float x[32], original[32];
    uint codes[32], w[BITS];
    for (int i = 0; i < 32; ++i) {
      const int n = i / 8, e = i % 8;
      const int token = KEYS ? k_token(D, int(lane), unit, n) : v_token(int(lane), n, e);
      const int channel = KEYS ? k_channel(D, int(lane), unit, n, e) : v_channel(int(lane), unit, e);
      const float size = rms[token];
      original[i] = x[i] = size > 0.0f ? (y[token * D + channel] - row[channel]) / size : 0.0f;
    }
    quantise_unit<BITS, CODE>(x, levels, codes);
    pack_unit<BITS, CODE>(codes, w);
    for (int k = 0; k < BITS; ++k) part[word_index(D, BITS, int(lane), unit, k)] = w[k];
    // <u, c> and <c, c> of each token: over the four lanes t and a nibble word of keys, over g and two channels of values
    for (int n = 0; n < 4; ++n) {
      for (int k = 0; k < (KEYS ? 1 : 4); ++k) {
        float uc = 0.0f, cc = 0.0f;
        for (int e = k; e < 8; e += KEYS ? 1 : 4) uc += original[8 * n + e] * x[8 * n + e], cc += x[8 * n + e] * x[8 * n + e];
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
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int token = int(simdgroup * 32 + lane);
  if (token < PAGE) {
    float uc = 0.0f, cc = 0.0f;
    for (int k = 0; k < 4; ++k) uc += sums[(k * PAGE + token) * 2], cc += sums[(k * PAGE + token) * 2 + 1];
    const float uu = rms[token] > 0.0f ? float(D) : 0.0f;
    float gain;
    if (RULE == NORM) gain = sqrt(uu / cc);
    else if (RULE == LEAST_SQUARES) gain = uc / cc;
    else gain = uu / (uc > 0.0f ? uc : 1.0f);
    scales[token] = rms[token] * gain;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The smallest exponent with which every scale times `margin` of a page has a log8 code (codec/packing.py, log8_base).
inline int log8_base(threadgroup const float* scales, float margin, uint lane) {
  const float top = simd_max(max(scales[lane], scales[lane + 32])) * margin;
  return top > 0.0f ? int(clamp(ceil(log2(top) - 254.5f / float(LOG8_STEPS)), -128.0f, 127.0f)) : 0;
}

inline uchar log8_code(float scale, int base) {
  if (!(scale >= exp2(float(base - 1)))) return 0;
  return uchar(clamp(rint((log2(scale) - float(base)) * float(LOG8_STEPS)) + 1.0f, 1.0f, 255.0f));
}

// The mean row of the page, int8 in float: [D] of row, in units of the step; its low bits hold `header` (format.h).
template <int D>
inline void make_row(threadgroup const float* mean, float step, uint header, threadgroup float* row, int thread_index) {
  for (int c = thread_index; c < D; c += 128) {
    const float x = step > 0.0f ? mean[c] / step : mean[c];
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
  if (SCALES == FP16) ((device half*)part)[thread_index] = half(scales[thread_index]);
  else part[thread_index] = log8_code(scales[thread_index], base);
}

// Floats of threadgroup memory: mean, row, scaled row, zeros [D] each; levels [2, 16]; rms [64]; sums [4, 64, 2]; scales
// [64].
constexpr int encode_scratch(int dim) { return 4 * dim + 32 + PAGE + 8 * PAGE + PAGE; }

// y_k, y_v: [kv_heads, tokens, D] f32, rotated; k_levels, v_levels: [16] f32.
// records: [pages, kv_heads, BYTES] u8; status: [pages, kv_heads] u32, NOT_FINITE and TOO_LARGE bits.
template <class P, int K_RULE, int V_RULE, bool KEY_MEAN>
inline void encode(const device float* y_k, const device float* y_v, int tokens, const device float* k_levels,
                   const device float* v_levels, device uchar* records, device uint* status, threadgroup float* scratch,
                   uint3 group, uint3 groups, uint simdgroup, uint lane) {
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
  threadgroup float* sums = rms + PAGE;
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

  quantise_side<P::D, P::V_BITS, P::V_CODE, false, V_RULE>(values, zeros, levels + 16, (device uint*)(record + P::V_CODES),
                                                           rms, sums, scales, simdgroup, lane);
  bool fits = isfinite(step);
  int v_exponent = 0, k_exponent = 0;
  if (!fp16_scales) v_exponent = log8_base(scales, 1.0f, lane);
  if (me < PAGE) fits = fits && isfinite(fp16_scales ? float(half(scales[me])) : scales[me]);
  store_scales<P::SCALES>(scales, v_exponent, record + P::V_SCALES, me);

  // The keys' exponent is part of the row that they are coded against: with log8 scales a first round finds it.
  for (int round = fp16_scales ? 1 : 0; round < 2; ++round) {
    uint header = uint(as_type<ushort>(half(step)));
    if (round == 1) header |= uint(k_exponent & 255) << 16 | uint(v_exponent & 255) << 24;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    make_row<P::D>(mean, step, header, row, me);
    for (int c = me; c < P::D; c += 128) scaled[c] = row[c] * step;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    quantise_side<P::D, P::K_BITS, P::K_CODE, true, K_RULE>(keys, scaled, levels, (device uint*)record, rms, sums, scales,
                                                            simdgroup, lane);
    if (round == 0) k_exponent = log8_base(scales, exp2(0.0625f), lane);
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

}  // namespace fa

//! body
  threadgroup float scratch[fa::encode_scratch(D)];
  fa::encode<fa::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, K_RULE, V_RULE, KEY_MEAN>(
      y_k, y_v, y_k_shape[1], k_levels, v_levels, records, status, scratch, threadgroup_position_in_grid,
      threadgroups_per_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
