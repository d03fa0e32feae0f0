// Python face of samples, best-fit packing and megatron-core's sample index.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind_tokens.hpp"
#include "bindings.hpp"
#include "mcore_indices.hpp"
#include "packing.hpp"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<std::int64_t, py::array::c_style>;
using Int32s = py::array_t<std::int32_t, py::array::c_style>;

constexpr std::int64_t kMaxLength = std::int64_t{1} << 30;

void require_length(std::int64_t seq_length) {
  if (seq_length < 1 || seq_length > kMaxLength)
    throw std::invalid_argument("seq_length is " + std::to_string(seq_length) + ", expected 1..2^30");
}

template <typename Array>
Array owned(std::vector<typename Array::value_type>&& values) {
  auto* kept = new std::vector<typename Array::value_type>(std::move(values));
  const py::capsule owner(kept, [](void* vector) { delete static_cast<std::vector<typename Array::value_type>*>(vector); });
  return Array(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

void check_pieces(std::int64_t stream_tokens, const Int64s& firsts, const Int32s& counts, std::int64_t seq_length) {
  if (firsts.size() != counts.size()) throw std::invalid_argument("firsts and counts differ in length");
  std::int64_t total = 0;
  for (py::ssize_t k = 0; k < firsts.size(); ++k) {
    const std::int64_t first = firsts.at(k);
    const std::int64_t count = counts.at(k);
    total += count;
    if (first < 0 || count < 1 || first >= stream_tokens - count || total > seq_length)
      throw std::out_of_range("predictions " + std::to_string(first) + " to " + std::to_string(first + count) +
                              " of a stream of " + std::to_string(stream_tokens) + " tokens, " +
                              std::to_string(total) + " of " + std::to_string(seq_length) + " in the sample");
  }
}

// One sample of seq_length positions out of pieces of a stream: (tokens, labels, where stretches begin).
py::tuple sample(const py::array& stream, const Int64s& document_starts, const Int64s& firsts, const Int32s& counts,
                 std::int64_t seq_length, std::int64_t vocab_size) {
  require_length(seq_length);
  const cpt::TokenStream source(stream);
  check_pieces(source.size(), firsts, counts, seq_length);
  Int64s tokens(seq_length);
  Int64s labels(seq_length);
  cpt::SampleWriter writer(tokens.mutable_data(), labels.mutable_data(), seq_length, vocab_size);
  const std::int64_t* const documents = document_starts.data();
  const std::int64_t* const documents_end = documents + document_starts.size();
  {
    const py::gil_scoped_release free;  // pages of the stream may have to be read from a disk
    source.visit([&](const auto* from) {
      for (py::ssize_t k = 0; k < firsts.size(); ++k) {
        const std::int64_t first = firsts.data()[k];
        writer.add(from, first, counts.data()[k], std::upper_bound(documents, documents_end, first), documents_end);
      }
    });
    writer.pad();
  }
  Int64s starts(static_cast<py::ssize_t>(writer.starts.size()));
  std::copy(writer.starts.begin(), writer.starts.end(), starts.mutable_data());
  return py::make_tuple(std::move(tokens), std::move(labels), std::move(starts));
}

// The pieces of all documents in bins of seq_length predictions by best-fit decreasing, bin after bin, in the order of
// the stream inside of a bin: (first prediction of each piece, predictions of each piece, border of each bin among
// the pieces).
py::tuple pack(const Int64s& document_starts, std::int64_t seq_length) {
  require_length(seq_length);
  const std::int64_t* starts = document_starts.data();
  const auto documents = static_cast<std::size_t>(std::max<py::ssize_t>(document_starts.size() - 1, 0));
  std::vector<std::int64_t> firsts;
  std::vector<std::int32_t> counts;
  std::vector<std::int64_t> borders(1, 0);
  {
    const py::gil_scoped_release free;
    for (std::size_t d = 0; d < documents; ++d)
      if (starts[d] > starts[d + 1]) throw std::invalid_argument("document starts fall");
    std::int64_t longest = 0;  // predictions of a piece
    cpt::for_each_piece(starts, documents, seq_length,
                        [&](std::int64_t, std::int64_t count) { longest = std::max(longest, count); });
    std::vector<std::int64_t> histogram(static_cast<std::size_t>(longest) + 1, 0);
    cpt::for_each_piece(starts, documents, seq_length,
                        [&](std::int64_t, std::int64_t count) { ++histogram[static_cast<std::size_t>(count)]; });
    const cpt::Packing packing(histogram, seq_length);
    for (const std::uint32_t pieces : packing.bin_pieces) borders.push_back(borders.back() + pieces);
    std::vector<std::int64_t> rank(histogram.size(), 0);  // of the next piece of each length, by falling length
    for (std::size_t length = histogram.size() - 1; length > 1; --length)
      rank[length - 1] = rank[length] + histogram[length];
    std::vector<std::int64_t> free_slot(borders.begin(), borders.end() - 1);
    firsts.resize(packing.bin_of.size());
    counts.resize(packing.bin_of.size());
    cpt::for_each_piece(starts, documents, seq_length, [&](std::int64_t first, std::int64_t count) {
      const std::uint32_t bin = packing.bin_of[static_cast<std::size_t>(rank[static_cast<std::size_t>(count)]++)];
      const auto slot = static_cast<std::size_t>(free_slot[bin]++);
      firsts[slot] = first;
      counts[slot] = static_cast<std::int32_t>(count);
    });
  }
  return py::make_tuple(owned<Int64s>(std::move(firsts)), owned<Int32s>(std::move(counts)),
                        owned<Int64s>(std::move(borders)));
}

template <typename Index>
py::array fill_sample_index(const Int32s& lengths, const Int32s& order, std::int64_t seq_length,
                            std::int64_t num_samples) {
  py::array_t<Index> rows({static_cast<py::ssize_t>(num_samples) + 1, py::ssize_t{2}});
  Index* out = rows.mutable_data();
  const py::gil_scoped_release free;
  cpt::sample_index(lengths.data(), order.data(), order.size(), seq_length, num_samples, out);
  return rows;
}

// megatron-core's sample index over documents in this order: int32 where places and offsets fit, else int64.
py::array sample_index(const Int32s& lengths, const Int32s& order, std::int64_t seq_length, std::int64_t num_samples) {
  require_length(seq_length);
  std::int64_t tokens = 0;
  for (py::ssize_t k = 0; k < order.size(); ++k) {
    const std::int32_t document = order.data()[k];
    if (document < 0 || document >= lengths.size() || lengths.data()[document] < 0)
      throw std::out_of_range("document " + std::to_string(document) + " of " + std::to_string(lengths.size()));
    tokens += lengths.data()[document];
  }
  if (num_samples < 0 || num_samples > (tokens - 1) / seq_length)
    throw std::invalid_argument(std::to_string(num_samples) + " samples of " + std::to_string(tokens) + " tokens");
  return order.size() <= std::numeric_limits<std::int32_t>::max()
             ? fill_sample_index<std::int32_t>(lengths, order, seq_length, num_samples)
             : fill_sample_index<std::int64_t>(lengths, order, seq_length, num_samples);
}

}  // namespace

void bind_packing(py::module_& module) {
  module.def("sample", &sample, py::arg("stream").noconvert(), py::arg("document_starts").noconvert(),
             py::arg("firsts").noconvert(), py::arg("counts").noconvert(), py::arg("seq_length"),
             py::arg("vocab_size"));
  module.def("sample_index", &sample_index, py::arg("lengths").noconvert(), py::arg("order").noconvert(),
             py::arg("seq_length"), py::arg("num_samples"));
  module.def("pack", &pack, py::arg("document_starts").noconvert(), py::arg("seq_length"));
}
