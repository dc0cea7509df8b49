// Rotated vectors of a page to its record. The codes of a side are worked on as paths: a unit's 32 codes run over the
// steps, units over the lanes of vectors, so that the trellis search and the packing need no shuffles.
#pragma once

#include <cmath>

#include "search.h"

namespace forge {

// Position token * dim + channel of step s of path p, in the order [s][p]; p counts words of a record row.
const uint16_t* path_positions(int dim, bool keys);

template <class Isa>
struct Encode {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  using U32 = typename Isa::U32;
  static constexpr int W = Isa::WORDS;

  struct Scratch {
    float* u;                      // [64][dim] vectors over their root mean square
    float* x;                      // [64][dim] what is coded
    float* steps;                  // [32][2 dim] the same as paths, or [dim][64] by columns
    float* error;                  // [dim][64] by columns
    uint8_t *codes, *best_codes;   // [64][dim]
    int8_t *levels, *best_levels;  // [64][dim]
    uint8_t* path_codes;           // [32][2 dim]
    float* scales;                 // [64]
    float* residual;               // [64][dim]
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
      x = reinterpret_cast<float*>(take(4 * n));
      error = reinterpret_cast<float*>(take(4 * n));
      steps = reinterpret_cast<float*>(take(4 * n));
      residual = reinterpret_cast<float*>(take(4 * n));
      scales = reinterpret_cast<float*>(take(4 * PAGE));
      codes = take(n);
      best_codes = take(n);
      levels = reinterpret_cast<int8_t*>(take(n));
      best_levels = reinterpret_cast<int8_t*>(take(n));
      path_codes = take(n);
      end = at;
    }
  };
  static size_t scratch_bytes(int dim) { return size_t(Scratch(nullptr, dim).end - static_cast<uint8_t*>(nullptr)); }

  static float root_mean_square(const float* y, int dim) {
    F32 sum = F32{};
    for (int i = 0; i < dim; i += W) sum += load<F32>(y + i) * load<F32>(y + i);
    return std::sqrt(sum_of(sum) / float(dim));
  }

  // Codes and levels of s.x as it is.
  static void code(const Side& side, bool keys, int dim, const Feedback& feedback, Scratch& s) {
    const int paths = 2 * dim, count = side.level_count();
    float values[16];
    for (int i = 0; i < count; ++i) values[i] = side.unit * float(side.levels[i]);
    if (feedback.factor) {
      const KeyOrder& order = key_order(dim);
      const auto channels = [&](int c) { return side.code == SCALAR ? order.channel[0] : order.channels(c); };
      for (int c = 0; c < PAGE; ++c) {
        const float* x = s.x + order.token(c) * dim;
        const uint16_t* channel = channels(c);
        for (int i = 0; i < dim; ++i) s.steps[i * PAGE + c] = x[channel[i]];
      }
      Search<Isa>::shaped(side, dim, s.steps, feedback, values, s.error, s.path_codes);
      for (int c = 0; c < PAGE; ++c) {
        uint8_t* codes = s.codes + order.token(c) * dim;
        const uint16_t* channel = channels(c);
        for (int i = 0; i < dim; ++i) codes[channel[i]] = s.path_codes[i * PAGE + c];
      }
    } else if (side.code == SCALAR) {
      for (int i = 0; i < PAGE * dim; ++i) {
        int code = 0;
        for (int j = 0; j + 1 < count; ++j) code += s.x[i] > 0.5f * (values[j] + values[j + 1]);
        s.codes[i] = uint8_t(code);
      }
    } else {
      const uint16_t* position = path_positions(dim, keys);
      for (int i = 0; i < 32 * paths; ++i) s.steps[i] = s.x[position[i]];
      for (int p = 0; p < paths; p += W) Search<Isa>::paths(side, s.steps + p, paths, values, s.path_codes + p);
      for (int i = 0; i < 32 * paths; ++i) s.codes[position[i]] = s.path_codes[i];
    }
    if (side.code == SCALAR) {
      for (int i = 0; i < PAGE * dim; ++i) s.levels[i] = side.levels[s.codes[i]];
      return;
    }
    const uint16_t* position = path_positions(dim, keys);
    for (int p = 0; p < paths; ++p) {
      int reg = 0;
      for (int t = 29; t < 32; ++t) reg = reg << 1 | (s.codes[position[t * paths + p]] & 1);
      for (int t = 0; t < 32; ++t) {
        const int at = position[t * paths + p], code = s.codes[at];
        reg = (reg << 1 | (code & 1)) & 15;
        s.levels[at] = side.levels[code >> 1 << 2 | Search<Isa>::subset_of(side.states(), reg)];
      }
    }
  }

  static float gain(const Side& side, float uu, float uc, float cc) {
    return side.rule == NORM ? std::sqrt(uu / cc) : side.rule == LEAST_SQUARES ? uc / cc : uu / (uc > 0 ? uc : 1);
  }
  // Error e^T H e of each token's levels, summed over the tokens that share paths; groups are numbered by `group` [64].
  static void errors(const Side& side, int dim, const Feedback& feedback, Scratch& s, const int8_t* group, float* out) {
    float per_token[PAGE];
    const KeyOrder& order = key_order(dim);
    for (int c = 0; c < PAGE; ++c) {
      const int t = feedback.factor ? order.token(c) : c;
      float uu = 0, uc = 0, cc = 0;
      sums(s.u + t * dim, s.levels + t * dim, dim, uu, uc, cc);
      uc *= side.unit;
      cc *= side.unit * side.unit;
      const float g = gain(side, uu, uc, cc);
      per_token[c] = uu - 2 * g * uc + g * g * cc;
      if (feedback.factor)
        for (int i = 0; i < dim; ++i) {
          const int at = t * dim + order.channel[0][i];
          s.error[i * PAGE + c] = s.u[at] - g * side.unit * float(s.levels[at]);
        }
    }
    if (feedback.factor) Search<Isa>::energy(dim, s.error, feedback, per_token);
    for (int i = 0; i < PAGE; ++i) out[i] = 0;
    for (int c = 0; c < PAGE; ++c) out[group[feedback.factor ? order.token(c) : c]] += per_token[c];
  }

  // Codes and levels of vectors y [64][dim] and their scales, into s.
  static void quantise(const Side& side, bool keys, int dim, const float* y, bool refine, const Feedback& feedback,
                       Scratch& s) {
    float norms[PAGE];
    for (int t = 0; t < PAGE; ++t) {
      norms[t] = root_mean_square(y + t * dim, dim);
      const float inverse = norms[t] > 0 ? 1 / norms[t] : 0;
      for (int i = 0; i < dim; ++i) s.x[t * dim + i] = s.u[t * dim + i] = y[t * dim + i] * inverse;
    }
    code(side, keys, dim, feedback, s);
    if (refine) improve(side, keys, dim, feedback, s);
    for (int t = 0; t < PAGE; ++t) {
      float uu = 0, uc = 0, cc = 0;
      sums(s.u + t * dim, s.levels + t * dim, dim, uu, uc, cc);
      s.scales[t] = norms[t] * gain(side, uu, uc * side.unit, cc * side.unit * side.unit);
    }
    const uint16_t* position = path_positions(dim, keys);
    for (int i = 0; i < PAGE * dim; ++i) s.path_codes[i] = s.codes[position[i]];
  }
  // Codes again at multiples of each vector's own scale; every group of tokens keeps its best.
  static void improve(const Side& side, bool keys, int dim, const Feedback& feedback, Scratch& s) {
    const KeyOrder& order = key_order(dim);
    int8_t group[PAGE];
    for (int c = 0; c < PAGE; ++c)
      if (side.code == SCALAR)
        group[c] = int8_t(c);
      else if (keys)
        group[order.token(c)] = int8_t(order.group(c));
      else
        group[c] = int8_t(c >> 4);
    float fit[PAGE], least[PAGE], now[PAGE];
    for (int t = 0; t < PAGE; ++t) {
      float uu = 0, uc = 0, cc = 0;
      sums(s.u + t * dim, s.levels + t * dim, dim, uu, uc, cc);
      fit[t] = uc > 0 ? cc * side.unit / uc : 1;
    }
    errors(side, dim, feedback, s, group, least);
    __builtin_memcpy(s.best_codes, s.codes, size_t(PAGE) * dim);
    __builtin_memcpy(s.best_levels, s.levels, size_t(PAGE) * dim);
    for (const float multiplier : {0.9f, 0.95f, 1.0f, 1.05f, 1.1f}) {
      for (int t = 0; t < PAGE; ++t)
        for (int i = 0; i < dim; ++i) s.x[t * dim + i] = s.u[t * dim + i] * (fit[t] * multiplier);
      code(side, keys, dim, feedback, s);
      errors(side, dim, feedback, s, group, now);
      for (int t = 0; t < PAGE; ++t)
        if (now[group[t]] < least[group[t]]) {
          __builtin_memcpy(s.best_codes + t * dim, s.codes + t * dim, dim);
          __builtin_memcpy(s.best_levels + t * dim, s.levels + t * dim, dim);
        }
      for (int g = 0; g < PAGE; ++g) least[g] = now[g] < least[g] ? now[g] : least[g];
    }
    __builtin_memcpy(s.codes, s.best_codes, size_t(PAGE) * dim);
    __builtin_memcpy(s.levels, s.best_levels, size_t(PAGE) * dim);
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
    for (int p = 0; p < paths; ++p) {
      uint32_t n[4] = {}, w[4];
      for (int e = 0; e < 8; ++e)
        for (int i = 0; i < 4; ++i) n[i] |= uint32_t(codes[(4 * e + i) * paths + p]) << 4 * e;
      if (bits == 4) {
        for (int k = 0; k < 4; ++k) w[k] = n[k];
      } else if (side.code != SCALAR) {
        w[0] = w[1] = w[2] = 0;
        for (int i = 0; i < 4; ++i) {
          const uint32_t level = n[i] >> 1;
          w[0] |= (n[i] & 0x11111111u) << i;
          if (bits == 2)
            w[1] |= (level & 0x11111111u) << i;
          else
            w[1 + i % 2] |= (level & 0x33333333u) << (i < 2 ? 2 : 0);
        }
      } else if (bits == 2) {
        w[0] = n[0] | n[1] << 2;
        w[1] = n[2] | n[3] << 2;
      } else {
        for (int k = 0; k < 3; ++k) w[k] = n[k] | (n[3] >> k & 0x11111111u) << 3;
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

  static bool encode(const Codec& c, int head, float* k, float* v, uint8_t* record, void* scratch) {
    const int dim = c.dim;
    Scratch s(scratch, dim);
    const Feedback none{nullptr, nullptr}, feedback = feedback_of(c, head);
    quantise(c.v, false, dim, v, c.refine, none, s);
    const int v_base = c.scales == LOG8 ? log8_base(s.scales, 1) : 0;
    pack(c.v, dim, s.path_codes, record + v_offset(dim, c.k.bits, c.scales));
    if (!put_scales(s.scales, c.scales, v_base, record + v_scale_offset(dim, c.k.bits, c.v.bits, c.scales)))
      return false;

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
    // The base follows from the scales of the residual, which depends on the base through low bits of the row. So it is
    // guessed from the norms, with room for what those bits and refinement may add, and the keys are coded again in the
    // few cases where the scales say otherwise.
    const float room = c.refine ? 1.189207115f : 1.0442737824f;  // 2^(1/4), 2^(1/16)
    int k_base = 0;
    take_mean(k_base);
    if (c.scales == LOG8) {
      for (int t = 0; t < PAGE; ++t) s.scales[t] = root_mean_square(s.residual + t * dim, dim);
      k_base = log8_base(s.scales, room * 1.02f);
      take_mean(k_base);
    }
    quantise(c.k, true, dim, s.residual, c.refine, feedback, s);
    if (c.scales == LOG8) {
      const int needed = log8_base(s.scales, c.refine ? 1 : room);
      if (c.refine ? needed > k_base : needed != k_base) {
        k_base = needed;
        take_mean(k_base);
        quantise(c.k, true, dim, s.residual, c.refine, feedback, s);
      }
    }
    pack(c.k, dim, s.path_codes, record);
    return put_scales(s.scales, c.scales, k_base, record + k_scale_offset(dim, c.k.bits));
  }
};

}  // namespace forge
