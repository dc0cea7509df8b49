// Choice of the instruction set at run time.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "numbers.h"
#include "encode.h"

namespace forge {

const Octave OCTAVE = [] {
  Octave o;
  for (int i = 0; i < LOG8_STEPS; ++i) o.steps[i] = float(std::exp2(i / double(LOG8_STEPS)));
  return o;
}();

namespace {

struct Positions {
  std::vector<uint16_t> keys, values;
  explicit Positions(int dim) : keys(size_t(PAGE) * dim), values(size_t(PAGE) * dim) {
    const int c = chunk(dim), row = LANES * c, paths = 2 * dim;
    for (int s = 0; s < 32; ++s)
      for (int p = 0; p < paths; ++p) {
        const int unit = p / row * c + p % c, lane = p % row / c, n = s % 4, e = s / 4;
        keys[s * paths + p] = uint16_t(k_token(dim, lane, unit, n) * dim + k_channel(dim, lane, unit, n, e));
        values[s * paths + p] = uint16_t(v_token(lane, n, e) * dim + v_channel(lane, unit, e));
      }
  }
};

bool has(const char* name) {
  const std::string isa = name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  if (isa == "avxvnni") return avx2 && __builtin_cpu_supports("avxvnni");
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
  if (isa == "neon") {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor that runs macOS on Arm
#endif
  }
#endif
  return isa == "portable";
}

const Kernels* chosen = nullptr;

}  // namespace

const uint16_t* path_positions(int dim, bool keys) {
  static const Positions tables[] = {Positions(64), Positions(96), Positions(128), Positions(256), Positions(512)};
  const Positions& p = tables[dim == 64 ? 0 : dim == 96 ? 1 : dim == 128 ? 2 : dim == 256 ? 3 : 4];
  return (keys ? p.keys : p.values).data();
}

KeyOrder::KeyOrder(int dim) : steps(dim / 32) {
  run = steps % 4 == 0 ? steps / 4 : steps % 2 == 0 ? steps / 2 : steps;
  tokens = 4 * run / steps;
  chains = 8 / tokens;
  orders = 0;
  uint16_t visits[4][MAX_DIM];
  int seen[4] = {};
  for (int t = 0; t < 4; ++t)
    for (int unit = 0; unit < run; ++unit)
      for (int i = 0; i < 32; ++i) {
        const int token = (4 * unit + i % 4) / steps;
        visits[token][seen[token]++] = uint16_t(k_channel(dim, t, unit, i % 4, i / 4));
      }
  for (int token = 0; token < tokens; ++token) {
    const size_t bytes = sizeof(uint16_t) * dim;
    int same = 0;
    while (same < orders && std::memcmp(channel[same], visits[token], bytes) != 0) ++same;
    if (same == orders) std::memcpy(channel[orders++], visits[token], bytes);
    order[token] = same;
  }
}

const KeyOrder& key_order(int dim) {
  static const KeyOrder tables[] = {KeyOrder(64), KeyOrder(96), KeyOrder(128), KeyOrder(256), KeyOrder(512)};
  return tables[dim == 64 ? 0 : dim == 96 ? 1 : dim == 128 ? 2 : dim == 256 ? 3 : 4];
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> out;
#if defined(FORGEATTENTION_HAVE_AVX512)
  if (has("avx512")) out.push_back(&avx512_kernels());
#endif
#if defined(FORGEATTENTION_HAVE_AVXVNNI)
  if (has("avxvnni")) out.push_back(&avxvnni_kernels());
#endif
#if defined(FORGEATTENTION_HAVE_AVX2)
  if (has("avx2")) out.push_back(&avx2_kernels());
#endif
#if defined(FORGEATTENTION_HAVE_NEON)
  if (has("neon")) out.push_back(&neon_kernels());
#endif
  out.push_back(&portable_kernels());
  return out;
}

void use_kernels(const char* name) {
  std::string known;
  for (const Kernels* k : available_kernels()) {
    if (std::string(k->name) == name) {
      chosen = k;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("[cpu] expected an instruction set of this processor and build (" + known + "); got '" +
                              name + "'");
}

const Kernels& kernels() {
  if (!chosen) {
    const char* forced = std::getenv("FORGEATTENTION_CPU_ISA");
    if (forced && *forced)
      use_kernels(forced);
    else
      chosen = available_kernels().front();
  }
  return *chosen;
}

}  // namespace forge
