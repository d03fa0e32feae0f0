// Python face of the encoder.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "bpe.hpp"
#include "model_file.hpp"

namespace py = pybind11;

namespace {

// The content of `values` as an array that owns it.
template <class Value>
py::array_t<Value> owned(std::vector<Value>&& values) {
  auto* const moved = new std::vector<Value>(std::move(values));
  py::capsule owner(moved, [](void* held) { delete static_cast<std::vector<Value>*>(held); });
  return py::array_t<Value>(static_cast<py::ssize_t>(moved->size()), moved->data(), owner);
}

std::unique_ptr<cpt::BpeEncoder> make(const py::bytes& data) {
  const std::string_view file = data;
  const py::gil_scoped_release release;
  const cpt::BpeModel model = cpt::read_bpe_model(file);
  return std::make_unique<cpt::BpeEncoder>(model.pieces, model.byte_fallback, model.normalizer);
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
      .def(py::init(&make), py::arg("model"))
      .def(
          "encode",
          [](const cpt::BpeEncoder& encoder, const cpt::Block& block, std::int64_t before, std::int64_t after,
             bool wide) {
            return wide ? encode<std::int32_t>(encoder, block, {before, after})
                        : encode<std::uint16_t>(encoder, block, {before, after});
          },
          py::arg("block"), py::arg("before"), py::arg("after"), py::arg("wide"));
}
