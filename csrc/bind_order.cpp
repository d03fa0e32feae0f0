// Python face of the order of the data. Twins in megatron_cpt/data/reference.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind_tokens.hpp"
#include "bindings.hpp"
#include "order.hpp"
#include "packing.hpp"
#include "stage_order.hpp"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<std::int64_t, py::array::c_style>;

constexpr std::int64_t kMaxSize = std::int64_t{1} << 62;

void require_size(std::int64_t size) {
  if (size < 1 || size > kMaxSize) throw std::invalid_argument("size is " + std::to_string(size) + ", expected 1..2^62");
}

// Which window the index-th visit of a source falls on: one full permutation per epoch.
std::int64_t visit(std::int64_t index, std::int64_t size, std::uint64_t key) {
  require_size(size);
  if (index < 0) throw std::out_of_range("index below 0");
  const auto epoch = static_cast<std::uint64_t>(index / size);
  const cpt::Permutation permutation(static_cast<std::uint64_t>(size), cpt::derive(key, epoch));
  return static_cast<std::int64_t>(permutation(static_cast<std::uint64_t>(index % size)));
}

// One lane a row: start, end, first block, last block (-1: to the end of the stage).
cpt::StageOrder stage_order(const Int64s& lanes, std::int64_t unit, std::int64_t samples, std::int64_t block) {
  if (lanes.ndim() != 2 || lanes.shape(1) != 4) throw std::invalid_argument("lanes must be rows of four numbers");
  std::vector<cpt::Lane> rows;
  for (py::ssize_t s = 0; s < lanes.shape(0); ++s) {
    const std::int64_t* row = lanes.data(s, 0);
    rows.push_back({row[0], row[1], row[2], row[3] < 0 ? cpt::StageOrder::kForever : row[3]});
  }
  const py::gil_scoped_release release;
  return {std::move(rows), unit, samples, block};
}

Int64s counts_of(const cpt::StageOrder& order, std::int64_t samples) {
  const std::vector<std::int64_t> counts = order.counts(samples);
  return Int64s(static_cast<py::ssize_t>(counts.size()), counts.data());
}

// Tokens first..first+length-1 of a stream as int64, and where documents start among them.
std::pair<Int64s, Int64s> gather(const py::array& stream, const Int64s& starts, std::int64_t first,
                                 std::int64_t length, std::int64_t vocab_size) {
  const cpt::TokenStream source(stream);
  if (first < 0 || length < 0 || first > source.size() - length)
    throw std::out_of_range("tokens " + std::to_string(first) + " to " + std::to_string(first + length) +
                            " of a stream of " + std::to_string(source.size()));
  Int64s tokens(length);
  std::int64_t* out = tokens.mutable_data();
  source.visit([&](const auto* in) {
    for (std::int64_t k = 0; k < length; ++k) out[k] = cpt::checked_token(in, first + k, vocab_size);
  });

  const std::int64_t* begin = starts.data();
  const std::int64_t* end = begin + starts.size();
  const std::int64_t* from = std::lower_bound(begin, end, first);
  const std::int64_t* to = std::lower_bound(from, end, first + length);
  Int64s boundaries(to - from);
  std::int64_t* boundary = boundaries.mutable_data();
  std::transform(from, to, boundary, [first](std::int64_t start) { return start - first; });
  return {std::move(tokens), std::move(boundaries)};
}

}  // namespace

void bind_order(py::module_& module) {
  module.def("derive", &cpt::derive, py::arg("key"), py::arg("number"));
  module.def("visit", &visit, py::arg("index"), py::arg("size"), py::arg("key"));
  py::class_<cpt::StageOrder>(module, "StageOrder")
      .def(py::init(&stage_order), py::arg("lanes").noconvert(), py::arg("unit"), py::arg("samples"), py::arg("block"))
      .def("at", &cpt::StageOrder::at, py::arg("sample"))
      .def("counts", &counts_of, py::arg("samples"));
  module.def("gather", &gather, py::arg("stream").noconvert(), py::arg("starts").noconvert(), py::arg("first"),
             py::arg("length"), py::arg("vocab_size"));
}
