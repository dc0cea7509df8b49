// Codes of a page's keys on trellis paths or with feedback, at several multiples of each vector's norm.
//
// A chain is a run of units that begins and ends with whole tokens: TOKENS tokens, LENGTH codes in the order in which
// paths visit them (position: 32 unit + code). A lane searches one chain for two multiples; what earlier units feed
// back comes from tensor cores, for all chains of a warp at once.
#pragma once
#include "paths.cuh"

namespace keys {
constexpr FORGE_FN int gcd4(int n) { return n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1; }
constexpr int RUN = STEPS / gcd4(STEPS), TOKENS = 4 * RUN / STEPS;  // units of a lane in a chain
constexpr int CHAINS = 8 * UNITS / RUN, CHAIN_UNITS = 4 * RUN, LENGTH = 32 * CHAIN_UNITS;
constexpr int BLOCKS_OF = (CHAINS + 31) / 32, TRIES = 2 * FORGE_PAIRS, KEY_WARPS = FORGE_KEY_WARPS;
constexpr bool SHAPED = FORGE_SHAPED, PATHS = FORGE_K_CODE != forge::SCALAR;
constexpr int U_ROW = LENGTH + 16, E_ROW = LENGTH - 16, X_ROW = 36;  // so that loads of fragments meet no bank twice
constexpr int SUMS = 9;  // of a token: <u, c>, <c, c>, u^T H e, e^T H e for either multiple; u^T H u

// Words of feedback of a head (backends/cuda/params.py, Feedback): factors as A fragments [unit][2][LENGTH / 16][32
// lanes][4], then those within a unit, [unit][from 32][in 32], then weights [LENGTH], both as pairs of equal halves.
constexpr int FRAGMENTS = CHAIN_UNITS * 2 * (LENGTH / 16) * 128, INSIDE = CHAIN_UNITS * 1024;

// A warp's part of shared memory, and what warps share.
struct Area {
  unsigned short* errors;  // [64 columns: chain, multiple][E_ROW]
  u32* x;                  // [32][X_ROW] with what earlier units feed back
  u32* found;              // [32][32] errors of the unit
  u32* choices;            // [16][32]
  unsigned short* z;       // [32][X_ROW] M u, with M the factor
  float* sums;             // [TOKENS][SUMS][32]
  static constexpr int BYTES =
      (SHAPED ? 64 * E_ROW * 2 + 32 * X_ROW * 2 : 0) + 32 * X_ROW * 4 + 4096 + 2048 + TOKENS * SUMS * 128;
  __device__ __forceinline__ explicit Area(u8* at) {
    x = (u32*)at;
    found = x + 32 * X_ROW;
    choices = found + 1024;
    sums = (float*)(choices + 512);
    errors = (unsigned short*)(sums + TOKENS * SUMS * 32);
    z = errors + 64 * E_ROW;
  }
};
struct Results {
  u32* nibbles;   // [TRIES][CHAINS][LENGTH / 8] codes
  float* energy;  // [TRIES][64]
  float* scale;   // [TRIES][64]
  static constexpr int BYTES = TRIES * (CHAINS * LENGTH / 2 + 512);
  __device__ __forceinline__ explicit Results(u8* at) {
    nibbles = (u32*)at;
    energy = (float*)(nibbles + TRIES * CHAINS * LENGTH / 8);
    scale = energy + TRIES * forge::PAGE;
  }
};
constexpr int U_BYTES = CHAINS * U_ROW * 2;

// Chains are numbered so that eight neighbours are the lane groups g of one run of units.
__device__ __forceinline__ int token_of(int chain, int local) {
  const int g = chain & 7;
  return (g >> 1) * 16 + 2 * ((chain >> 3) * TOKENS + local) + (g & 1);
}
__device__ __forceinline__ float multiple(int i) {
  // As good as multiples of each vector's own fit, which would need a search before the others.
  if constexpr (!FORGE_REFINE) return 1.f;
  return TRIES == 2   ? 0.96f + 0.08f * i
         : TRIES == 4 ? 0.90f + 0.06f * i
         : TRIES == 6 ? 0.86f + 0.05f * i
                      : 0.86f + 0.0375f * i;
}

template <int RULE>
__device__ __forceinline__ float gain(float uu, float uc, float cc) {
  return RULE == 2 ? sqrtf(uu / cc) : RULE == 1 ? uc / cc : uu / (uc > 0.f ? uc : 1.f);
}

// u: [CHAINS][U_ROW] halves, vectors of unit variance by chain and position.
template <int RULE>
__device__ __forceinline__ void search(const u32* feedback, const uint2* table, float unit, const unsigned short* u,
                                       const float* norm, u8* areas, const Results& results, int warp, int lane) {
  if (warp >= KEY_WARPS) return;
  const int g = lane >> 2, t = lane & 3;
  const Area area(areas + warp * Area::BYTES);
  const uint4* fragments = (const uint4*)feedback;
  const u32* inside = feedback + FRAGMENTS;
  const u32* weights = inside + INSIDE;
#pragma unroll 1
  for (int task = warp; task < BLOCKS_OF * FORGE_PAIRS; task += KEY_WARPS) {
    const int first_chain = task % BLOCKS_OF * 32, pair = task / BLOCKS_OF, chain = min(first_chain + lane, CHAINS - 1);
    const bool mine = first_chain + lane < CHAINS;
    const u32 multiples = half2(multiple(2 * pair) / (16.f * unit), multiple(2 * pair + 1) / (16.f * unit));
    const unsigned short* own_u = u + chain * U_ROW;
    for (int i = 0; i < TOKENS * SUMS; ++i) area.sums[i * 32 + lane] = 0.f;
#pragma unroll 1
    for (int part = 0; part < CHAIN_UNITS; ++part) {
      if constexpr (SHAPED) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float base[8][4], z[4][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int n = 0; n < 8; ++n) base[n][i] = 0.f;
#pragma unroll
            for (int n = 0; n < 4; ++n) z[n][i] = 0.f;
          }
#pragma unroll 1
          for (int k = 0; k < 2 * part + 2; ++k) {
            const uint4 a = __ldg(fragments + ((part * 2 + half) * (LENGTH / 16) + k) * 32 + lane);
            const u32 a4[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              const uint2 b = *(const uint2*)(u + min(first_chain + 8 * n + g, CHAINS - 1) * U_ROW + 16 * k + 4 * t);
              mma_16<HALF>(z[n], a4, b.x, b.y);
            }
            if (k < 2 * part)
#pragma unroll
              for (int n = 0; n < 8; ++n) {
                const uint2 b = *(const uint2*)(area.errors + (8 * n + g) * E_ROW + 16 * k + 4 * t);
                mma_16<HALF>(base[n], a4, b.x, b.y);
              }
          }
          const int row = 16 * half + g;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            area.x[row * X_ROW + 4 * n + t] = half2(base[n][0], base[n][1]);
            area.x[(row + 8) * X_ROW + 4 * n + t] = half2(base[n][2], base[n][3]);
          }
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            *(u32*)(area.z + row * X_ROW + 8 * n + 2 * t) = half2(z[n][0], z[n][1]);
            *(u32*)(area.z + (row + 8) * X_ROW + 8 * n + 2 * t) = half2(z[n][2], z[n][3]);
          }
        }
        __syncwarp();
      }
      // Eight numbers of the unit, as they are, in both halves.
      const auto doubled = [&](int block, u32(&x)[8]) {
        const uint4 v = *(const uint4*)(own_u + 32 * part + 8 * block);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = prmt(w[i / 2], 0, i & 1 ? 0x3232u : 0x1010u);
      };
      const auto plain = [&](int block, u32(&x)[8]) {
        doubled(block, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = hmul2(x[i], multiples);
      };
#pragma unroll 1
      for (int block = 0; block < 4; ++block) {
        u32 x[8];
        plain(block, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          u32& at = area.x[(8 * block + i) * X_ROW + lane];
          at = SHAPED ? hadd2(at, x[i]) : x[i];
        }
      }
      const auto value = [&](int i) { return area.x[i * X_ROW + lane]; };
      const auto eight = [&](const u32* from, u32(&x)[8]) {
        const uint4 a = __ldg((const uint4*)from), b = __ldg((const uint4*)from + 1);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
      };
      const auto weight = [&](int block, u32(&w)[8]) { eight(weights + 32 * part + 8 * block, w); };
      const auto factor = [&](int i, int block, u32(&f)[8]) { eight(inside + (32 * part + i) * 32 + 8 * block, f); };
      u32* const errors = area.found + lane;
      u32 bits[2] = {0, 0}, c1[2] = {0, 0}, c0[2] = {0, 0};
      if constexpr (PATHS) {
        using Path = paths::Trellis<FORGE_K_CODE>;
        const u32 seam = Path::seam(table, value);
        Path::template search<SHAPED>(table, seam, area.choices + lane, errors, 32, value, plain, weight, factor);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          bits[h] = Path::path(seam, area.choices + lane, 32, h);
          Path::subsets(bits[h], c1[h], c0[h]);
        }
      }
      // The codes themselves, with the feedback that they give; sums by nibble word.
      u32 nibbles[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, uc[4] = {0, 0, 0, 0}, cc[4] = {0, 0, 0, 0},
          ze[4] = {0, 0, 0, 0}, ee[4] = {0, 0, 0, 0};
      float zz[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int block = 0; block < 4; ++block) {
        u32 x[8], own[8], w[8], e[8], places[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = value(8 * block + i);
        doubled(block, own);
        if constexpr (SHAPED) {
          weight(block, w);
#pragma unroll 2
          for (int j = 0; j < 8 * block; ++j) {
            u32 f[8];
            factor(j, block, f);
            const u32 before = errors[j * 32];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = hfma2(f[i], before, x[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = i & 3;
          const u32 at = paths::bins_of(x[i]);
          const uint2 a = table[at & 255], b = table[at >> 16 & 255];
          u32 pick = 0x40;
          if constexpr (PATHS) {
            const int shift = 8 * block + i;
            pick |= (c1[0] >> shift & 1) << 1 | (c0[0] >> shift & 1) | (c1[1] >> shift & 1) << 5 |
                    (c0[1] >> shift & 1) << 4;
          }
          const u32 level = paths::level_of(prmt(prmt(a.x, b.x, pick), 0x64646464u, 0x4140u));
          places[n] |= prmt(prmt(a.y, b.y, pick), 0, 0x4140u) << (4 * (i >> 2));
          const u32 d = hsub2(x[i], level);
          e[i] = hsub2(hmul2(own[i], multiples), level);
          uc[n] = hfma2(own[i], level, uc[n]);
          cc[n] = hfma2(level, level, cc[n]);
          if constexpr (SHAPED) {
            const u32 z = paths::pair_of(area.z[(8 * block + i) * X_ROW + lane]), wd = hmul2(w[i], d);
            ze[n] = hfma2(wd, z, ze[n]);
            ee[n] = hfma2(wd, d, ee[n]);
            const float zf = half_to_float(z & 0xFFFFu);
            zz[n] = fmaf(zf * half_to_float(w[i] & 0xFFFFu), zf, zz[n]);
            errors[(8 * block + i) * 32] = e[i];
            if (i < 7) {
              u32 f[8];
              factor(8 * block + i, block, f);
#pragma unroll
              for (int k = i + 1; k < 8; ++k) x[k] = hfma2(f[k], e[i], x[k]);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          nibbles[0][n] |= (places[n] & 0xFFu) << (8 * block);
          nibbles[1][n] |= (places[n] >> 16 & 0xFFu) << (8 * block);
        }
        if constexpr (SHAPED) {
          if (part + 1 < CHAIN_UNITS)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const u32 which = h ? 0x7632u : 0x5410u;
              *(uint4*)(area.errors + (2 * lane + h) * E_ROW + 32 * part + 8 * block) = make_uint4(
                  prmt(e[0], e[1], which), prmt(e[2], e[3], which), prmt(e[4], e[5], which), prmt(e[6], e[7], which));
            }
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float* sums = area.sums + (4 * (part % RUN) + n) / STEPS * SUMS * 32 + lane;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto number = [&](u32 x) { return half_to_float(h ? x >> 16 : x & 0xFFFFu); };
          sums[(4 * h) * 32] += number(uc[n]);
          sums[(4 * h + 1) * 32] += number(cc[n]);
          if constexpr (SHAPED) {
            sums[(4 * h + 2) * 32] += number(ze[n]);
            sums[(4 * h + 3) * 32] += number(ee[n]);
          }
          if (mine)
            results.nibbles[((2 * pair + h) * CHAINS + chain) * (LENGTH / 8) + 4 * part + n] =
                nibbles[h][n] | (PATHS ? bits[h] >> n & 0x11111111u : 0u);
        }
        if constexpr (SHAPED) sums[8 * 32] += zz[n];
      }
      __syncwarp();
    }
    const float sixteen = 16.f * unit;
    for (int local = 0; local < TOKENS && mine; ++local) {
      const int token = token_of(chain, local);
      const float n = norm[token], uu = n > 0.f ? (float)DIM : 0.f;
      const float* sums = area.sums + local * SUMS * 32 + lane;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float uc = sixteen * sums[4 * h * 32], cc = sixteen * sixteen * sums[(4 * h + 1) * 32],
                    scale = gain<RULE>(uu, uc, cc);
        float energy = uu - 2.f * scale * uc + scale * scale * cc;
        if constexpr (SHAPED) {
          // u - scale c, with c = m u - e
          const float m = half_to_float(h ? multiples >> 16 : multiples & 0xFFFFu) * sixteen, rest = 1.f - scale * m,
                      left = scale * sixteen;
          energy = rest * rest * sums[8 * 32] + 2.f * rest * left * sums[(4 * h + 2) * 32] +
                   left * left * sums[(4 * h + 3) * 32];
        }
        results.energy[(2 * pair + h) * forge::PAGE + token] = energy;
        results.scale[(2 * pair + h) * forge::PAGE + token] = n * scale;
      }
    }
    __syncwarp();
  }
}

// Four nibble words of codes to the words of a unit (docs/format.md), the inverse of forge::unit_nibbles.
template <int BITS, int CODE>
__device__ __forceinline__ void pack_unit(const u32 (&n)[4], u32 (&w)[BITS]) {
#pragma unroll
  for (int k = 0; k < BITS; ++k) w[k] = 0;
  if constexpr (BITS == 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = n[k];
  } else if constexpr (CODE != forge::SCALAR) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      w[0] |= (n[k] & 0x11111111u) << k;
      if constexpr (BITS == 2) {
        w[1] |= (n[k] >> 1 & 0x11111111u) << k;
      } else {
        w[1 + k % 2] |= (n[k] >> 1 & 0x33333333u) << (k < 2 ? 2 : 0);
      }
    }
  } else if constexpr (BITS == 2) {
    w[0] = n[0] | n[1] << 2;
    w[1] = n[2] | n[3] << 2;
  } else {
#pragma unroll
    for (int k = 0; k < 3; ++k) w[k] = n[k] | (n[3] >> k & 0x11111111u) << 3;
  }
}

// Takes the best multiple of each token, or of the tokens that share paths; best[64] and scale[64] are told. A barrier
// must stand before and after.
__device__ __forceinline__ void choose(const Results& results, u8* best, float* scale) {
  const int me = (int)threadIdx.x;
  constexpr int EACH = PATHS ? TOKENS : 1;
  if (me >= (PATHS ? CHAINS : forge::PAGE)) return;
  int found = 0;
  float least = 0.f;
#pragma unroll 1
  for (int i = 0; i < TRIES; ++i) {
    float energy = 0.f;
    for (int local = 0; local < EACH; ++local)
      energy += results.energy[i * forge::PAGE + (PATHS ? token_of(me, local) : me)];
    if (i == 0 || energy < least) least = energy, found = i;
  }
  for (int local = 0; local < EACH; ++local) {
    const int token = PATHS ? token_of(me, local) : me;
    best[token] = (u8)found;
    scale[token] = results.scale[found * forge::PAGE + token];
  }
}
__device__ __forceinline__ void write(const Results& results, const u8* best, u8* codes) {
  for (int i = (int)threadIdx.x; i < 32 * UNITS; i += 256) {
    const int lane = i & 31, unit = i >> 5, chain = unit / RUN * 8 + (lane >> 2), part = (lane & 3) * RUN + unit % RUN;
    u32 n[4], w[FORGE_K_BITS];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      n[k] = results.nibbles[(best[forge::k_token(DIM, lane, unit, k)] * CHAINS + chain) * (LENGTH / 8) + 4 * part + k];
    pack_unit<FORGE_K_BITS, FORGE_K_CODE>(n, w);
#pragma unroll
    for (int b = 0; b < FORGE_K_BITS; ++b)
      *(u32*)(codes + 4 * forge::word_index(DIM, FORGE_K_BITS, lane, unit, b)) = w[b];
  }
}
}  // namespace keys
