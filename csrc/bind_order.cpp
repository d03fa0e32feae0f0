// Python face of the order of the data. Twins in megatron_cpt/data/reference.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "order.hpp"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<std::int64_t, py::array::c_style>;

constexpr std::int64_t kMaxSize = std::int64_t{1} << 62;
constexpr std::int64_t kMaxBlock = std::int64_t{1} << 20;

void require_size(std::int64_t size) {
  if (size < 1 || size > kMaxSize) throw std::invalid_argument("size is " + std::to_string(size) + ", expected 1..2^62");
}

Int64s permute(const Int64s& positions, std::int64_t size, std::uint64_t key) {
  require_size(size);
  const cpt::Permutation permutation(static_cast<std::uint64_t>(size), key);
  Int64s result(positions.size());
  const std::int64_t* in = positions.data();
  std::int64_t* out = result.mutable_data();
  for (py::ssize_t k = 0; k < positions.size(); ++k) {
    if (in[k] < 0 || in[k] >= size) throw std::out_of_range("position outside of 0..size-1");
    out[k] = static_cast<std::int64_t>(permutation(static_cast<std::uint64_t>(in[k])));
  }
  return result;
}

// Which window the index-th visit of a source falls on: one full permutation per epoch.
Int64s visit(const Int64s& indices, std::int64_t size, std::uint64_t key) {
  require_size(size);
  Int64s result(indices.size());
  const std::int64_t* in = indices.data();
  std::int64_t* out = result.mutable_data();
  for (py::ssize_t k = 0; k < indices.size(); ++k) {
    if (in[k] < 0) throw std::out_of_range("index below 0");
    const auto epoch = static_cast<std::uint64_t>(in[k] / size);
    const cpt::Permutation permutation(static_cast<std::uint64_t>(size), cpt::derive(key, epoch));
    out[k] = static_cast<std::int64_t>(permutation(static_cast<std::uint64_t>(in[k] % size)));
  }
  return result;
}

// The source of each slot of a block, and how many earlier slots of the block have the same source.
void lay_out_block(std::uint64_t key, const std::int64_t* quota, std::size_t sources, std::vector<std::int64_t>& source,
                   std::vector<std::int64_t>& rank) {
  const cpt::Permutation permutation(source.size(), key);
  std::vector<std::int64_t> seen(sources, 0);
  for (std::size_t slot = 0; slot < source.size(); ++slot) {
    auto left = static_cast<std::int64_t>(permutation(slot));
    std::size_t s = 0;
    while (left >= quota[s]) left -= quota[s++];
    source[slot] = static_cast<std::int64_t>(s);
    rank[slot] = seen[s]++;
  }
}

// The source of each sample and its number among the samples of that source. A block of sum(quotas)
// samples holds exactly quotas[s] samples of source s, in an order keyed by the block.
std::pair<Int64s, Int64s> locate(const Int64s& samples, const Int64s& quotas, std::uint64_t key) {
  const std::int64_t* quota = quotas.data();
  const std::int64_t block_size = std::accumulate(quota, quota + quotas.size(), std::int64_t{0});
  if (std::any_of(quota, quota + quotas.size(), [](std::int64_t q) { return q < 0 || q > kMaxBlock; }) ||
      block_size < 1 || block_size > kMaxBlock)
    throw std::invalid_argument("quotas must not be below 0 and must add up to 1..2^20");
  std::vector<std::int64_t> block_sources(static_cast<std::size_t>(block_size));
  std::vector<std::int64_t> block_ranks(block_sources.size());
  std::int64_t laid_out = -1;
  Int64s sources(samples.size());
  Int64s indices(samples.size());
  const std::int64_t* in = samples.data();
  std::int64_t* source = sources.mutable_data();
  std::int64_t* index = indices.mutable_data();
  for (py::ssize_t k = 0; k < samples.size(); ++k) {
    if (in[k] < 0) throw std::out_of_range("sample below 0");
    const std::int64_t block = in[k] / block_size;
    if (block != laid_out) {
      lay_out_block(cpt::derive(key, static_cast<std::uint64_t>(block)), quota,
                    static_cast<std::size_t>(quotas.size()), block_sources, block_ranks);
      laid_out = block;
    }
    const auto slot = static_cast<std::size_t>(in[k] % block_size);
    source[k] = block_sources[slot];
    index[k] = block * quota[source[k]] + block_ranks[slot];
  }
  return {std::move(sources), std::move(indices)};
}

template <typename Token>
void copy_tokens(const void* stream, std::int64_t first, std::int64_t length, std::int64_t vocab_size,
                 std::int64_t* out) {
  const Token* in = static_cast<const Token*>(stream) + first;
  for (std::int64_t k = 0; k < length; ++k) {
    const auto token = static_cast<std::int64_t>(in[k]);
    if (token < 0 || token >= vocab_size)
      throw std::range_error("token id " + std::to_string(token) + " at token " + std::to_string(first + k));
    out[k] = token;
  }
}

// Tokens first..first+length-1 of a stream as int64, and where documents start among them.
std::pair<Int64s, Int64s> gather(const py::array& stream, const Int64s& starts, std::int64_t first,
                                 std::int64_t length, std::int64_t vocab_size) {
  if (stream.ndim() != 1 || !(stream.flags() & py::array::c_style))
    throw std::invalid_argument("the token stream must be one contiguous row");
  if (first < 0 || length < 0 || first > stream.size() - length)
    throw std::out_of_range("tokens " + std::to_string(first) + " to " + std::to_string(first + length) +
                            " of a stream of " + std::to_string(stream.size()));
  Int64s tokens(length);
  std::int64_t* out = tokens.mutable_data();
  const char kind = stream.dtype().kind();
  const py::ssize_t width = stream.itemsize();
  if (kind == 'u' && width == 2) copy_tokens<std::uint16_t>(stream.data(), first, length, vocab_size, out);
  else if (kind == 'i' && width == 4) copy_tokens<std::int32_t>(stream.data(), first, length, vocab_size, out);
  else if (kind == 'u' && width == 1) copy_tokens<std::uint8_t>(stream.data(), first, length, vocab_size, out);
  else if (kind == 'i' && width == 1) copy_tokens<std::int8_t>(stream.data(), first, length, vocab_size, out);
  else if (kind == 'i' && width == 2) copy_tokens<std::int16_t>(stream.data(), first, length, vocab_size, out);
  else if (kind == 'i' && width == 8) copy_tokens<std::int64_t>(stream.data(), first, length, vocab_size, out);
  else throw std::invalid_argument("the token stream holds no integer type of the format");

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
  module.def("permute", &permute, py::arg("positions").noconvert(), py::arg("size"), py::arg("key"));
  module.def("visit", &visit, py::arg("indices").noconvert(), py::arg("size"), py::arg("key"));
  module.def("locate", &locate, py::arg("samples").noconvert(), py::arg("quotas").noconvert(), py::arg("key"));
  module.def("gather", &gather, py::arg("stream").noconvert(), py::arg("starts").noconvert(), py::arg("first"),
             py::arg("length"), py::arg("vocab_size"));
}
