// Python bindings. Arrays arrive as (address, dtype, strides) from backends/cpu/views.py, which has checked them:
// reading a torch tensor's pointer costs a tenth of a DLPack exchange, and a decode step makes one call a layer.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "half.h"
#include "ops.h"
#include "sparse.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace forge;

namespace {

using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using ByteArray = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using View = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // address, dtype, strides in elements
using TableView = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int>;
using ExactView = std::tuple<View, View, uintptr_t, int>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
Array4 array(const View& v) {
  return {pointer<void>(std::get<0>(v)), {std::get<2>(v), std::get<3>(v), std::get<4>(v)}, std::get<1>(v)};
}
Table table_of(const TableView& v) {
  return {pointer<const uint8_t>(std::get<0>(v)), std::get<1>(v),
          pointer<const int64_t>(std::get<2>(v)), std::get<3>(v),
          pointer<const int32_t>(std::get<4>(v)), std::get<5>(v)};
}

Side side(int bits, int code, const ByteArray& levels, float unit, int rule) {
  Side s{bits, code, {}, unit, rule};
  std::memcpy(s.levels, levels.data(), levels.size());
  return s;
}
std::vector<float> floats(const FloatArray& a) { return {a.data(), a.data() + a.size()}; }

LinearMap dense(const FloatArray& columns, int dim) {
  LinearMap m;
  m.dim = dim;
  m.heads = int(columns.size() / (size_t(dim) * dim));
  m.columns = floats(columns);
  return m;
}
LinearMap hadamard(const FloatArray& signs, int dim, bool inverse) {
  LinearMap m;
  m.kind = inverse ? LinearMap::HADAMARD_INVERSE : LinearMap::HADAMARD;
  m.dim = dim;
  m.heads = int(signs.size()) / dim;
  m.signs = floats(signs);
  return m;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Codec>(m, "Codec")
      .def(
          "__init__",
          [](Codec* self, int head_dim, int dim, int kv_heads, int scales, bool key_mean, bool refine,
             std::tuple<int, int, float, int> k, std::tuple<int, int, float, int> v, ByteArray k_levels,
             ByteArray v_levels, FloatArray signs, FloatArray k_signs, FloatArray k_signs_inverse, FloatArray k_forward,
             FloatArray k_inverse, FloatArray query, FloatArray v_forward, FloatArray v_inverse, FloatArray k_mu,
             FloatArray v_mu, FloatArray k_factor, FloatArray k_weight) {
            new (self) Codec;
            self->head_dim = head_dim;
            self->dim = dim;
            self->kv_heads = kv_heads;
            self->scales = scales;
            self->key_mean = key_mean;
            self->refine = refine;
            self->k = side(std::get<0>(k), std::get<1>(k), k_levels, std::get<2>(k), std::get<3>(k));
            self->v = side(std::get<0>(v), std::get<1>(v), v_levels, std::get<2>(v), std::get<3>(v));
            self->k_mu = floats(k_mu);
            self->v_mu = floats(v_mu);
            self->k_factor = floats(k_factor);
            self->k_weight = floats(k_weight);
            if (signs.size()) {
              self->k_forward = hadamard(k_signs, dim, false);
              self->query = hadamard(k_signs_inverse, dim, false);
              self->k_inverse = hadamard(k_signs_inverse, dim, true);
              self->v_forward = hadamard(signs, dim, false);
              self->v_inverse = hadamard(signs, dim, true);
            } else {
              self->k_forward = dense(k_forward, dim);
              self->k_inverse = dense(k_inverse, dim);
              self->query = dense(query, dim);
              self->v_forward = dense(v_forward, dim);
              self->v_inverse = dense(v_inverse, dim);
            }
          },
          nb::arg("head_dim"), nb::arg("padded_dim"), nb::arg("kv_heads"), nb::arg("scales"), nb::arg("key_mean"),
          nb::arg("refine"), nb::arg("k"), nb::arg("v"), nb::arg("k_levels"), nb::arg("v_levels"), nb::arg("signs"),
          nb::arg("k_signs"), nb::arg("k_signs_inverse"), nb::arg("k_forward"), nb::arg("k_inverse"), nb::arg("query"),
          nb::arg("v_forward"), nb::arg("v_inverse"), nb::arg("k_mu"), nb::arg("v_mu"), nb::arg("k_factor"),
          nb::arg("k_weight"))
      .def_prop_ro("page_bytes", &Codec::page);

  m.def("encode", [](const Codec& codec, View k, View v, int64_t pages, uintptr_t out, int64_t out_bytes,
                     uintptr_t offsets, int threads) {
    const nb::gil_scoped_release release;
    encode(codec, array(k), array(v), pages, pointer<uint8_t>(out), out_bytes, pointer<const int64_t>(offsets),
           threads);
  });
  m.def("compact", [](uintptr_t base, int64_t bytes, uintptr_t offsets, int64_t pages, int64_t page_bytes,
                      uintptr_t out, int threads) {
    const nb::gil_scoped_release release;
    compact(pointer<const uint8_t>(base), bytes, pointer<const int64_t>(offsets), pages, page_bytes,
            pointer<uint8_t>(out), threads);
  });
  m.def("decode_pages", [](const Codec& codec, TableView table, int batch, bool rotated, int dtype, uintptr_t k,
                           uintptr_t v, int64_t stride, int threads) {
    const nb::gil_scoped_release release;
    decode_pages(codec, table_of(table), batch, rotated, dtype, pointer<void>(k), pointer<void>(v), stride, threads);
  });
  m.def(
      "attention",
      [](const char* op, const Codec& codec, std::tuple<int, int, int> shape, View q, std::optional<TableView> table,
         std::optional<ExactView> exact, float scale, bool causal, uintptr_t sinks, int out_dtype, uintptr_t out,
         uintptr_t lse, int threads) {
        const nb::gil_scoped_release release;
        Table t{};
        Exact e{};
        if (table) t = table_of(*table);
        if (exact)
          e = {array(std::get<0>(*exact)), array(std::get<1>(*exact)), pointer<const int32_t>(std::get<2>(*exact)),
               std::get<3>(*exact)};
        decode_attention(op, codec, {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)}, array(q),
                         table ? &t : nullptr, exact ? &e : nullptr, scale, causal, pointer<const float>(sinks),
                         out_dtype, pointer<void>(out), pointer<float>(lse), threads);
      },
      nb::arg("op"), nb::arg("codec"), nb::arg("shape"), nb::arg("q"), nb::arg("table").none(), nb::arg("exact").none(),
      nb::arg("scale"), nb::arg("causal"), nb::arg("sinks"), nb::arg("out_dtype"), nb::arg("out"), nb::arg("lse"),
      nb::arg("threads"));
  m.def("qk_scores", [](const Codec& codec, std::tuple<int, int, int> shape, View q, TableView table, float scale,
                        uintptr_t out, int threads) {
    const nb::gil_scoped_release release;
    qk_scores(codec, {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)}, array(q), table_of(table), scale,
              pointer<float>(out), threads);
  });
  m.def("value_sum", [](const Codec& codec, std::tuple<int, int, int> shape, uintptr_t p, TableView table,
                        uintptr_t out, int threads) {
    const nb::gil_scoped_release release;
    value_sum(codec, {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)}, pointer<const float>(p),
              table_of(table), pointer<float>(out), threads);
  });

  using ScoredView =
      std::tuple<std::tuple<int, int, int>, int, uintptr_t, uintptr_t>;  // shape, max_length, scores, statistics
  const auto scored = [](const ScoredView& v) {
    const auto& [batch, q_heads, n] = std::get<0>(v);
    return Scored{{batch, q_heads, n},
                  std::get<1>(v),
                  pointer<const float>(std::get<2>(v)),
                  pointer<const float>(std::get<3>(v))};
  };
  m.def("sparse_scores", [](const Codec& codec, std::tuple<int, int, int> shape, View q, TableView table, float scale,
                            uintptr_t scores, uintptr_t stats, int threads) {
    const nb::gil_scoped_release release;
    sparse_scores(codec, {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)}, array(q), table_of(table), scale,
                  pointer<float>(scores), pointer<float>(stats), threads);
  });
  m.def("page_scores", [](const Codec& codec, std::tuple<int, int, int> shape, View q, TableView table, float scale,
                          uintptr_t out, int threads) {
    const nb::gil_scoped_release release;
    page_scores(codec, {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)}, array(q), table_of(table), scale,
                pointer<float>(out), threads);
  });
  m.def("sparse_threshold",
        [scored](ScoredView s, uintptr_t lengths, uintptr_t budgets, int budget, float top_p, uintptr_t exact_lse,
                 uintptr_t threshold, uintptr_t last, uintptr_t kept, uintptr_t dropped, uintptr_t top, int threads) {
          const nb::gil_scoped_release release;
          sparse_threshold(scored(s), pointer<const int>(lengths), pointer<const int>(budgets), budget, top_p,
                           pointer<const float>(exact_lse), pointer<float>(threshold), pointer<int>(last),
                           pointer<int>(kept), pointer<float>(dropped), pointer<float>(top), threads);
        });
  m.def("sparse_attention", [scored](const Codec& codec, ScoredView s, TableView table, uintptr_t threshold,
                                     uintptr_t last, uintptr_t top, uintptr_t out, uintptr_t lse, int threads) {
    const nb::gil_scoped_release release;
    sparse_attention(codec, scored(s), table_of(table), pointer<const float>(threshold), pointer<const int>(last),
                     pointer<const float>(top), pointer<float>(out), pointer<float>(lse), threads);
  });

  m.def("shares_torch_threads", &shares_torch_threads);
  m.def("read_pass", [](uintptr_t data, int64_t bytes, int threads) {
    const nb::gil_scoped_release release;
    return read_pass(pointer<const uint8_t>(data), bytes, threads);
  });

  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available_kernels()) names.push_back(k->name);
    return names;
  });
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("use_isa", [](const std::string& name) { use_kernels(name.c_str()); });

  // The layout of kernels/shared/format.h, for the test that ties it to codec/packing.py.
  m.def("layout", [](int dim, int k_bits, int v_bits, int scales) {
    nb::dict d;
    d["k_scale_offset"] = k_scale_offset(dim, k_bits);
    d["mean_offset"] = mean_offset(dim, k_bits, scales);
    d["v_offset"] = v_offset(dim, k_bits, scales);
    d["v_scale_offset"] = v_scale_offset(dim, k_bits, v_bits, scales);
    d["record_bytes"] = record_bytes(dim, k_bits, v_bits, scales);
    return d;
  });
  m.def("word_index",
        [](int dim, int bits, int lane, int unit, int word) { return word_index(dim, bits, lane, unit, word); });
  m.def("code_position", [](int dim, bool key, int lane, int unit, int n, int e) {
    return key ? std::make_tuple(k_token(dim, lane, unit, n), k_channel(dim, lane, unit, n, e))
               : std::make_tuple(v_token(lane, n, e), v_channel(lane, unit, e));
  });
}
