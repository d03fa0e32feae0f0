// Python face of document signatures and of the search for duplicates among them.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "block.hpp"
#include "duplicates.hpp"
#include "minhash.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void require(std::int64_t value, const char* what, std::int64_t low, std::int64_t high) {
  if (value < low || value > high)
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(value) + ", expected " +
                                std::to_string(low) + ".." + std::to_string(high));
}

Array<std::uint32_t> minhash(const cpt::Block& block, std::int64_t num_permutations, std::int64_t shingle,
                             std::uint64_t seed) {
  require(num_permutations, "num_permutations", 1, 4096);
  require(shingle, "shingle", 1, 64);
  const auto places = static_cast<std::size_t>(num_permutations);
  Array<std::uint32_t> signatures({block.size(), places});
  std::uint32_t* out = signatures.mutable_data();
  const py::gil_scoped_release release;
  cpt::MinHasher hasher(places, static_cast<std::size_t>(shingle), seed);
  for (std::size_t k = 0; k < block.size(); ++k) hasher.sign(block.document(k), out + k * places);
  return signatures;
}

Array<std::uint64_t> fingerprints(const cpt::Block& block) {
  Array<std::uint64_t> result({block.size(), std::size_t{2}});
  std::uint64_t* out = result.mutable_data();
  const py::gil_scoped_release release;
  for (std::size_t k = 0; k < block.size(); ++k) {
    const cpt::Fingerprint print = cpt::fingerprint(block.document(k));
    out[2 * k] = print.low;
    out[2 * k + 1] = print.high;
  }
  return result;
}

cpt::Rows rows_of(const Array<std::uint32_t>& words) {
  if (words.ndim() != 2) throw std::invalid_argument("signatures must be a table: documents x words");
  return {words.data(), static_cast<std::size_t>(words.shape(0)), static_cast<std::size_t>(words.shape(1))};
}

void require_band(const cpt::Rows& rows, std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int64_t>(rows.width);
  require(begin, "begin of the band", 0, width);
  require(end, "end of the band", begin, width);
}

template <typename T>
Array<T> array_of(const std::vector<T>& values) {
  Array<T> result(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), result.mutable_data());
  return result;
}

// Keys of words begin..end-1 of the rows marked in `chosen`, in rising order, and the row of each.
std::pair<Array<std::uint64_t>, Array<std::uint32_t>> sort_band(const Array<std::uint32_t>& words,
                                                                 const Array<bool>& chosen, std::int64_t begin,
                                                                 std::int64_t end) {
  const cpt::Rows rows = rows_of(words);
  require_band(rows, begin, end);
  if (static_cast<std::size_t>(chosen.size()) != rows.count)
    throw std::invalid_argument("chosen must mark each of the rows");
  require(static_cast<std::int64_t>(rows.count), "number of rows", 0, std::int64_t{1} << 32);
  const bool* mark = chosen.data();
  const auto count = std::count(mark, mark + rows.count, true);
  Array<std::uint64_t> keys(count);
  Array<std::uint32_t> numbers(count);
  std::uint64_t* key = keys.mutable_data();
  std::uint32_t* number = numbers.mutable_data();
  {
    const py::gil_scoped_release release;
    std::vector<cpt::BandEntry> entries;
    entries.reserve(static_cast<std::size_t>(count));
    for (std::size_t row = 0; row < rows.count; ++row)
      if (mark[row])
        entries.push_back({cpt::band_key(rows[row], static_cast<std::size_t>(begin), static_cast<std::size_t>(end)),
                           static_cast<std::int64_t>(row)});
    std::sort(entries.begin(), entries.end());
    for (const cpt::BandEntry& entry : entries) {
      *key++ = entry.key;
      *number++ = static_cast<std::uint32_t>(entry.document);
    }
  }
  return {std::move(keys), std::move(numbers)};
}

// Pairs (lower, higher) that connect the documents of equal keys which share `needed` of words begin..end-1.
// Document d is row d - firsts[p] of parts[p], for the last p with firsts[p] <= d.
Array<std::int64_t> join_band(const Array<std::uint64_t>& keys, const Array<std::int64_t>& documents,
                              const std::vector<Array<std::uint32_t>>& parts, const std::vector<std::int64_t>& firsts,
                              std::int64_t begin, std::int64_t end, std::int64_t needed) {
  if (keys.size() != documents.size() || parts.size() != firsts.size() || parts.empty() || firsts[0] != 0)
    throw std::invalid_argument("keys and documents, parts and firsts must go together; the first part begins at 0");
  std::vector<cpt::Rows> tables;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    tables.push_back(rows_of(parts[p]));
    require_band(tables[p], begin, end);
    if (p && firsts[p] - firsts[p - 1] != static_cast<std::int64_t>(tables[p - 1].count))
      throw std::invalid_argument("firsts must count the rows of the parts before");
  }
  require(needed, "number of equal words", 0, end - begin);
  const std::int64_t total = firsts.back() + static_cast<std::int64_t>(tables.back().count);
  std::vector<std::int64_t> pairs;
  const std::uint64_t* key = keys.data();
  const std::int64_t* document = documents.data();
  const auto size = static_cast<std::size_t>(keys.size());
  {
    const py::gil_scoped_release release;
    std::vector<cpt::BandEntry> entries(size);
    for (std::size_t k = 0; k < size; ++k) {
      if (document[k] < 0 || document[k] >= total) throw std::out_of_range("a document beyond the parts");
      entries[k] = {key[k], document[k]};
    }
    const auto row_of = [&](std::int64_t number) {
      const auto part = static_cast<std::size_t>(std::upper_bound(firsts.begin(), firsts.end(), number) -
                                                 firsts.begin() - 1);
      return tables[part][static_cast<std::size_t>(number - firsts[part])];
    };
    const cpt::Likeness alike{static_cast<std::size_t>(begin), static_cast<std::size_t>(end),
                              static_cast<std::size_t>(needed)};
    cpt::join_entries(entries, alike, row_of, [&pairs](std::int64_t low, std::int64_t high) {
      pairs.push_back(low);
      pairs.push_back(high);
    });
  }
  return array_of(pairs).reshape({static_cast<py::ssize_t>(pairs.size() / 2), py::ssize_t{2}});
}

void unite(cpt::Components& components, const Array<std::int64_t>& pairs) {
  const auto size = static_cast<std::int64_t>(components.size());
  const std::int64_t* pair = pairs.data();
  const py::ssize_t count = pairs.size() / 2;
  const py::gil_scoped_release release;
  for (py::ssize_t k = 0; k < 2 * count; ++k)
    if (pair[k] < 0 || pair[k] >= size) throw std::out_of_range("a document beyond the components");
  for (py::ssize_t k = 0; k < count; ++k) components.unite(pair[2 * k], pair[2 * k + 1]);
}

Array<std::int64_t> roots(cpt::Components& components) {
  Array<std::int64_t> result(static_cast<py::ssize_t>(components.size()));
  std::int64_t* out = result.mutable_data();
  const py::gil_scoped_release release;
  for (std::size_t k = 0; k < components.size(); ++k) out[k] = components.root(static_cast<std::int64_t>(k));
  return result;
}

}  // namespace

void bind_minhash(py::module_& module) {
  module.def("minhash", &minhash, py::arg("block"), py::arg("num_permutations") = 128, py::arg("shingle") = 5,
             py::arg("seed") = 0);
  module.def("fingerprints", &fingerprints, py::arg("block"));
  module.def("sort_band", &sort_band, py::arg("words").noconvert(), py::arg("chosen").noconvert(), py::arg("begin"),
             py::arg("end"));
  module.def("join_band", &join_band, py::arg("keys").noconvert(), py::arg("documents").noconvert(), py::arg("parts"),
             py::arg("firsts"), py::arg("begin"), py::arg("end"), py::arg("needed"));
  py::class_<cpt::Components>(module, "Components")
      .def(py::init<std::size_t>(), py::arg("count"))
      .def("unite", &unite, py::arg("pairs").noconvert())
      .def("roots", &roots);
}
