// Python face of the encoder.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "bpe.hpp"

namespace py = pybind11;

namespace {

// The content of `values` as an array that owns it.
template <class Value>
py::array_t<Value> owned(std::vector<Value>&& values) {
  auto* const moved = new std::vector<Value>(std::move(values));
  py::capsule owner(moved, [](void* held) { delete static_cast<std::vector<Value>*>(held); });
  return py::array_t<Value>(static_cast<py::ssize_t>(moved->size()), moved->data(), owner);
}

std::unique_ptr<cpt::BpeEncoder> make(const std::vector<std::tuple<py::bytes, float, int>>& rows, bool byte_fallback,
                                      const py::bytes& charsmap, bool add_dummy_prefix, bool remove_extra_whitespaces,
                                      bool escape_whitespaces, bool whitespace_as_suffix) {
  std::vector<cpt::Piece> pieces;
  for (const auto& [text, score, type] : rows) pieces.push_back({text, score, static_cast<cpt::PieceType>(type)});
  const cpt::NormalizerSettings settings{charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces,
                                         whitespace_as_suffix};
  return std::make_unique<cpt::BpeEncoder>(pieces, byte_fallback, settings);
}

template <class Token>
py::tuple encode(const cpt::BpeEncoder& encoder, const cpt::Block& block, cpt::Borders borders) {
  cpt::Encoded<Token> result;
  {
    const py::gil_scoped_release release;
    result = encoder.encode<Token>(block, borders);
  }
  return py::make_tuple(owned(std::move(result.tokens)), owned(std::move(result.lengths)), result.byte_tokens,
                        result.unknown_tokens);
}

}  // namespace

void bind_encoder(py::module_& module) {
  py::class_<cpt::BpeEncoder>(module, "BpeEncoder")
      .def(py::init(&make), py::arg("pieces"), py::arg("byte_fallback"), py::arg("charsmap"),
           py::arg("add_dummy_prefix"), py::arg("remove_extra_whitespaces"), py::arg("escape_whitespaces"),
           py::arg("whitespace_as_suffix"))
      .def(
          "encode",
          [](const cpt::BpeEncoder& encoder, const cpt::Block& block, std::int64_t before, std::int64_t after,
             bool wide) {
            return wide ? encode<std::int32_t>(encoder, block, {before, after})
                        : encode<std::uint16_t>(encoder, block, {before, after});
          },
          py::arg("block"), py::arg("before"), py::arg("after"), py::arg("wide"));
}
