// Rotated vectors of a page to its record. The codes of a side are worked on as paths: a unit's 32 codes run over the steps,
// units over the lanes of vectors, so that the trellis search and the packing need no shuffles.
#pragma once

#include <cmath>

#include "numbers.h"

namespace fa {

// Position token * dim + channel of step s of path p, in the order [s][p]; p counts words of a record row.
const uint16_t* path_positions(int dim, bool keys);

template <class Isa>
struct Encode {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  using U32 = typename Isa::U32;
  static constexpr int W = Isa::WORDS;

  struct Scratch {
    float* u;         // [64][dim] vectors over their root mean square
    float* steps;     // [32][2 dim] the same as paths
    uint8_t* codes;   // [64][dim]
    int8_t* levels;   // [64][dim]
    uint8_t* path_codes;  // [32][2 dim]
    float* scales;    // [64]
    float* residual;  // [64][dim]
    uint8_t* end;

    Scratch(void* block, int dim) {
      uint8_t* at = static_cast<uint8_t*>(block);
      const auto take = [&](size_t bytes) {
        uint8_t* p = at;
        at += bytes;
        return p;
      };
      const size_t n = size_t(PAGE) * dim;
      u = reinterpret_cast<float*>(take(4 * n));
      steps = reinterpret_cast<float*>(take(4 * n));
      residual = reinterpret_cast<float*>(take(4 * n));
      scales = reinterpret_cast<float*>(take(4 * PAGE));
      codes = take(n);
      levels = reinterpret_cast<int8_t*>(take(n));
      path_codes = take(n);
      end = at;
    }
  };
  static size_t scratch_bytes(int dim) { return size_t(Scratch(nullptr, dim).end - static_cast<uint8_t*>(nullptr)); }

  // Codes of W paths of least squared error, x at `stride` floats a step. A path is a circle of states: the first pass
  // finds the state from which the best circle starts, the second follows that circle (Viterbi 1967).
  template <int STATES, int BITS>
  static void viterbi(const float* x, int stride, const float* values, uint8_t* codes) {
    F32 best[32][4];   // least squared error of each subset of levels
    U32 history[32];   // from bit 8 on two bits for the level bits of each subset; below, bit s: which predecessor of s
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
  static FA_INLINE void step(F32 (&cost)[STATES], const F32 (&best)[4], F chosen) {
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
  static void search(const Side& side, const float* x, int stride, const float* values, uint8_t* codes) {
    if (side.bits == 3)
      side.states() == 4 ? viterbi<4, 3>(x, stride, values, codes) : viterbi<8, 3>(x, stride, values, codes);
    else
      side.states() == 4 ? viterbi<4, 2>(x, stride, values, codes) : viterbi<8, 2>(x, stride, values, codes);
  }

  static float root_mean_square(const float* y, int dim) {
    F32 sum = F32{};
    for (int i = 0; i < dim; i += W) sum += load<F32>(y + i) * load<F32>(y + i);
    return std::sqrt(sum_of(sum) / float(dim));
  }

  // Codes and levels of vectors y [64][dim] and their scales, into s.
  static void quantise(const Side& side, bool keys, int dim, const float* y, Scratch& s) {
    const int paths = 2 * dim;
    float norms[PAGE];
    for (int t = 0; t < PAGE; ++t) {
      norms[t] = root_mean_square(y + t * dim, dim);
      const float inverse = norms[t] > 0 ? 1 / norms[t] : 0;
      for (int i = 0; i < dim; ++i) s.u[t * dim + i] = y[t * dim + i] * inverse;
    }
    const uint16_t* position = path_positions(dim, keys);
    if (side.code == SCALAR) {
      const int count = side.level_count();
      float edges[16];
      for (int i = 0; i + 1 < count; ++i) edges[i] = 0.5f * side.unit * float(side.levels[i] + side.levels[i + 1]);
      for (int i = 0; i < PAGE * dim; ++i) {
        int code = 0;
        for (int j = 0; j + 1 < count; ++j) code += s.u[i] > edges[j];
        s.codes[i] = uint8_t(code);
      }
      for (int i = 0; i < PAGE * dim; ++i) s.levels[i] = side.levels[s.codes[i]];
      for (int i = 0; i < 32 * paths; ++i) s.path_codes[i] = s.codes[position[i]];
    } else {
      float values[16];
      for (int i = 0; i < side.level_count(); ++i) values[i] = side.unit * float(side.levels[i]);
      for (int i = 0; i < 32 * paths; ++i) s.steps[i] = s.u[position[i]];
      for (int p = 0; p < paths; p += W) search(side, s.steps + p, paths, values, s.path_codes + p);
      for (int p = 0; p < paths; ++p) {
        int reg = 0;
        for (int t = 29; t < 32; ++t) reg = reg << 1 | (s.path_codes[t * paths + p] & 1);
        for (int t = 0; t < 32; ++t) {
          const int code = s.path_codes[t * paths + p];
          reg = (reg << 1 | (code & 1)) & 15;
          s.levels[position[t * paths + p]] = side.levels[code >> 1 << 2 | subset_of(side.states(), reg)];
        }
      }
    }
    for (int t = 0; t < PAGE; ++t) {
      float uu = 0, uc = 0, cc = 0;
      sums(s.u + t * dim, s.levels + t * dim, dim, uu, uc, cc);
      uc *= side.unit;
      cc *= side.unit * side.unit;
      const float gain = side.rule == NORM ? std::sqrt(uu / cc) : side.rule == LEAST_SQUARES ? uc / cc : uu / (uc > 0 ? uc : 1);
      s.scales[t] = norms[t] * gain;
    }
  }
  static void sums(const float* u, const int8_t* c, int dim, float& uu, float& uc, float& cc) {
    F32 a = F32{}, b = F32{}, d = F32{};
    float level[MAX_DIM];
    for (int i = 0; i < dim; ++i) level[i] = float(c[i]);
    for (int i = 0; i < dim; i += W) {
      const F32 x = load<F32>(u + i), l = load<F32>(level + i);
      a += x * x;
      b += x * l;
      d += l * l;
    }
    uu = sum_of(a);
    uc = sum_of(b);
    cc = sum_of(d);
  }

  // path_codes to words: word k of path p is number (p / row * bits + k) * row + p % row.
  static void pack(const Side& side, int dim, const uint8_t* codes, uint8_t* out) {
    const int paths = 2 * dim, row = LANES * chunk(dim), bits = side.bits;
    const auto word = [&](int n, int p) {  // codes 8 n .. 8 n + 7 of path p in nibbles
      uint32_t w = 0;
      for (int e = 0; e < 8; ++e) w |= uint32_t(codes[(8 * n + e) * paths + p]) << 4 * e;
      return w;
    };
    for (int p = 0; p < paths; ++p) {
      uint32_t n[4], w[4];
      for (int i = 0; i < 4; ++i) n[i] = word(i, p);
      if (bits == 4) {
        for (int k = 0; k < 4; ++k) w[k] = n[k];
      } else if (bits == 2) {
        w[0] = n[0] | n[1] << 2;
        w[1] = n[2] | n[3] << 2;
      } else if (side.code == SCALAR) {
        for (int k = 0; k < 3; ++k) w[k] = n[k] | (n[3] >> k & 0x11111111u) << 3;
      } else {
        for (int k = 0; k < 3; ++k) w[k] = (n[k] & 0x66666666u) << 1 | (n[k] & 0x11111111u) | (n[3] >> (2 - k) & 0x11111111u) << 1;
      }
      for (int k = 0; k < bits; ++k) put(out + 4 * ((p / row * bits + k) * row + p % row), w[k]);
    }
  }

  static int log8_base(const float* scales, float factor) {
    float top = 0;
    for (int i = 0; i < PAGE; ++i) top = scales[i] > top ? scales[i] : top;
    if (!(top > 0)) return 0;
    const double base = std::ceil(std::log2(double(top) * factor) - 254.5 / LOG8_STEPS);
    return int(base < -128 ? -128 : base > 127 ? 127 : base);
  }
  static bool put_scales(const float* scales, int format, int base, uint8_t* out) {
    for (int i = 0; i < PAGE; ++i) {
      if (!(scales[i] < INF)) return false;
      if (format == FP16) {
        const uint16_t h = float_to_half(scales[i]);
        if (h == 0x7C00) return false;
        put(out + 2 * i, h);
        continue;
      }
      if (double(scales[i]) < std::ldexp(1.0, base - 1)) {
        out[i] = 0;
        continue;
      }
      const double b = std::nearbyint((std::log2(double(scales[i])) - base) * LOG8_STEPS) + 1;
      out[i] = uint8_t(b < 1 ? 1 : b > 255 ? 255 : b);
    }
    return true;
  }
  // The mean row with its header, nearest values with the right low bits (docs/format.md).
  static void put_mean(const float* mean, int dim, uint16_t step, int k_base, int v_base, int8_t* row) {
    const float s = half_to_float(step), inverse = s > 0 ? 1 / s : 0;
    const uint32_t header = step | uint32_t(uint8_t(k_base)) << 16 | uint32_t(uint8_t(v_base)) << 24;
    for (int i = 0; i < dim; ++i) {
      const float x = mean[i] * inverse;
      if (i >= HEADER_BYTES) {
        row[i] = int8_t(std::nearbyint(x));
        continue;
      }
      const float bit = float(header >> i & 1), value = std::nearbyint((x - bit) / 2) * 2 + bit;
      row[i] = int8_t(value > 127 ? value - 2 : value);
    }
  }

  static bool encode(const Codec& c, float* k, float* v, uint8_t* record, void* scratch) {
    const int dim = c.dim;
    Scratch s(scratch, dim);
    quantise(c.v, false, dim, v, s);
    const int v_base = c.scales == LOG8 ? log8_base(s.scales, 1) : 0;
    pack(c.v, dim, s.path_codes, record + v_offset(dim, c.k.bits, c.scales));
    if (!put_scales(s.scales, c.scales, v_base, record + v_scale_offset(dim, c.k.bits, c.v.bits, c.scales))) return false;

    float mean[MAX_DIM] = {};
    float top = 0;
    if (c.key_mean) {
      for (int t = 0; t < PAGE; ++t)
        for (int i = 0; i < dim; ++i) mean[i] += k[t * dim + i];
      for (int i = 0; i < dim; ++i) {
        mean[i] /= PAGE;
        const float a = mean[i] < 0 ? -mean[i] : mean[i];
        top = a > top ? a : top;
      }
    }
    const uint16_t step = float_to_half(top / 126.5f);
    if (step == 0x7C00) return false;
    if (!half_to_float(step))
      for (int i = 0; i < dim; ++i) mean[i] = 0;
    int8_t* row = reinterpret_cast<int8_t*>(record + mean_offset(dim, c.k.bits, c.scales));
    const float unit = half_to_float(step);
    const auto take_mean = [&](int k_base) {
      put_mean(mean, dim, step, k_base, v_base, row);
      for (int t = 0; t < PAGE; ++t)
        for (int i = 0; i < dim; ++i) s.residual[t * dim + i] = k[t * dim + i] - float(row[i]) * unit;
    };
    // The base follows from the scales of the residual, which depends on the base through low bits of the row only. So it is
    // guessed from the norms, and the keys are coded again in the few cases where the scales say otherwise.
    constexpr float ROOM = 1.0442737824f;  // 2^(1/16), for what the bits may add
    int k_base = 0;
    take_mean(k_base);
    if (c.scales == LOG8) {
      for (int t = 0; t < PAGE; ++t) s.scales[t] = root_mean_square(s.residual + t * dim, dim);
      k_base = log8_base(s.scales, ROOM * 1.02f);
      take_mean(k_base);
    }
    quantise(c.k, true, dim, s.residual, s);
    if (c.scales == LOG8 && log8_base(s.scales, ROOM) != k_base) {
      k_base = log8_base(s.scales, ROOM);
      take_mean(k_base);
      quantise(c.k, true, dim, s.residual, s);
    }
    pack(c.k, dim, s.path_codes, record);
    return put_scales(s.scales, c.scales, k_base, record + k_scale_offset(dim, c.k.bits));
  }
};

}  // namespace fa
