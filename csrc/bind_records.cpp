// Python face of blocks of documents.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bindings.hpp"
#include "block.hpp"
#include "records.hpp"
#include "sha256.hpp"

namespace py = pybind11;

namespace {

using Bools = py::array_t<bool, py::array::c_style>;
using Int64s = py::array_t<std::int64_t, py::array::c_style>;
static_assert(sizeof(bool) == 1);

// The bytes of a buffer, readable without the interpreter as long as this lives.
class Bytes {
 public:
  explicit Bytes(const py::buffer& buffer) : info_(buffer.request()) {
    if (info_.ndim > 1 || info_.itemsize != 1 || (info_.ndim == 1 && info_.strides[0] != 1))
      throw std::invalid_argument("expected bytes in one piece");
  }

  std::string_view view() const { return {static_cast<const char*>(info_.ptr), static_cast<std::size_t>(info_.size)}; }

 private:
  py::buffer_info info_;
};

std::string_view utf8_of(const py::handle& text) {
  py::ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (data == nullptr) throw py::error_already_set();
  return {data, static_cast<std::size_t>(size)};
}

// Each block takes a few MiB and lets go of them. The C library would give them back to the system every time, and each
// page of the next block would be a fault, which all threads wait for. So from the first block on it keeps some.
void keep_memory() {
#ifdef __GLIBC__
  static const bool done = mallopt(M_MMAP_THRESHOLD, 4 << 20) != 0 && mallopt(M_TRIM_THRESHOLD, 16 << 20) != 0;
  static_cast<void>(done);
#endif
}

cpt::Block from_texts(const py::list& texts) {
  cpt::Block block;
  for (const py::handle& text : texts) block.add(utf8_of(text), {}, static_cast<std::int64_t>(block.size()) + 1);
  return block;
}

cpt::Block of_fault(std::int64_t line, const std::string& reason) {
  cpt::Block block;
  block.faults.push_back({line, reason});
  return block;
}

template <typename Slice>
py::list strings(std::size_t size, Slice slice) {
  py::list all(size);
  for (std::size_t k = 0; k < size; ++k) {
    const std::string_view text = slice(k);
    all[k] = py::str(text.data(), text.size());
  }
  return all;
}

py::list texts_of(const cpt::Block& block) {
  return strings(block.size(), [&block](std::size_t k) { return block.document(k); });
}

py::list ids_of(const cpt::Block& block) {
  return strings(block.size(), [&block](std::size_t k) { return block.name(k); });
}

Int64s lines_of(const cpt::Block& block) {
  return Int64s(static_cast<py::ssize_t>(block.lines.size()), block.lines.data());
}

Int64s document_bytes(const cpt::Block& block) {
  Int64s sizes(static_cast<py::ssize_t>(block.size()));
  for (std::size_t k = 0; k < block.size(); ++k)
    sizes.mutable_data()[k] = static_cast<std::int64_t>(block.document(k).size());
  return sizes;
}

std::vector<std::pair<std::int64_t, std::string>> faults_of(const cpt::Block& block) {
  std::vector<std::pair<std::int64_t, std::string>> faults;
  for (const cpt::Fault& fault : block.faults) faults.emplace_back(fault.line, fault.reason);
  return faults;
}

const unsigned char* mask_of(const cpt::Block& block, const Bools& keep) {
  if (keep.ndim() != 1 || static_cast<std::size_t>(keep.size()) != block.size())
    throw std::invalid_argument("keep has " + std::to_string(keep.size()) + " entries for " +
                                std::to_string(block.size()) + " documents");
  return reinterpret_cast<const unsigned char*>(keep.data());
}

cpt::Block select(const cpt::Block& block, const Bools& keep) {
  const unsigned char* mask = mask_of(block, keep);
  const py::gil_scoped_release release;
  return block.select(mask);
}

Bools held_out(const cpt::Block& block, double fraction) {
  Bools result(static_cast<py::ssize_t>(block.size()));
  auto* out = reinterpret_cast<unsigned char*>(result.mutable_data());
  const py::gil_scoped_release release;
  cpt::held_out(block, fraction, out);
  return result;
}

py::bytes write_jsonl(const cpt::Block& block, const Bools& keep, const std::optional<py::list>& texts) {
  const unsigned char* mask = mask_of(block, keep);
  std::vector<std::optional<std::string_view>> changed;
  if (texts) {
    if (texts->size() != block.size())
      throw std::invalid_argument(std::to_string(texts->size()) + " texts for " + std::to_string(block.size()) +
                                  " documents");
    for (const py::handle& text : *texts)
      changed.push_back(text.is_none() ? std::nullopt : std::optional<std::string_view>(utf8_of(text)));
  }
  std::string out;
  {
    const py::gil_scoped_release release;
    out = cpt::write_jsonl(block, mask, changed);
  }
  return py::bytes(out);
}

cpt::Block parse_jsonl(const py::buffer& data, const std::string& text_field, std::int64_t first_line,
                       std::int64_t longest, bool keep_records) {
  keep_memory();
  const Bytes bytes(data);
  const py::gil_scoped_release release;
  return cpt::parse_jsonl(bytes.view(), text_field, first_line, longest, keep_records);
}

cpt::Block parse_txt(const py::buffer& data, std::int64_t first_line, std::int64_t longest) {
  keep_memory();
  const Bytes bytes(data);
  const py::gil_scoped_release release;
  return cpt::parse_txt(bytes.view(), first_line, longest);
}

using PyColumn = std::tuple<Int64s, py::buffer, std::optional<Bools>>;

// A column that has been checked: its offsets rise and stay inside of its data.
cpt::Column column_of(const PyColumn& column, const Bytes& data) {
  const auto& [offsets, buffer, valid] = column;
  const std::int64_t* first = offsets.data();
  const auto count = static_cast<std::size_t>(offsets.size());
  if (count == 0 || first[0] < 0 || !std::is_sorted(first, first + count) ||
      first[count - 1] > static_cast<std::int64_t>(data.view().size()))
    throw std::invalid_argument("the offsets of a column do not fit its data");
  if (valid && valid->size() + 1 != offsets.size()) throw std::invalid_argument("a column has another number of rows");
  return {first, data.view(), valid ? reinterpret_cast<const unsigned char*>(valid->data()) : nullptr};
}

cpt::Block parse_columns(const PyColumn& texts, const std::optional<PyColumn>& names, const std::string& text_field,
                         std::int64_t first_row, std::int64_t longest) {
  keep_memory();
  const Bytes text_bytes(std::get<1>(texts));
  const Bytes name_bytes(names ? std::get<1>(*names) : static_cast<py::buffer>(py::bytes()));
  const cpt::Column text_column = column_of(texts, text_bytes);
  std::optional<cpt::Column> name_column;
  if (names) {
    name_column = column_of(*names, name_bytes);
    if (std::get<0>(*names).size() != std::get<0>(texts).size())
      throw std::invalid_argument("a column has another number of rows");
  }
  const auto rows = static_cast<std::size_t>(std::get<0>(texts).size()) - 1;
  const py::gil_scoped_release release;
  return cpt::parse_columns(text_column, name_column, rows, text_field, first_row, longest);
}

void bind_block(py::module_& module) {
  py::class_<cpt::Block>(module, "Block")
      .def_static("from_texts", &from_texts, py::arg("texts"))
      .def_static("of_fault", &of_fault, py::arg("line"), py::arg("reason"))
      .def("__len__", &cpt::Block::size)
      .def_property_readonly("text_bytes", [](const cpt::Block& block) { return block.text.size(); })
      .def_property_readonly("document_bytes", &document_bytes)
      .def_property_readonly("lines", &lines_of)
      .def_property_readonly("faults", &faults_of)
      .def("texts", &texts_of)
      .def("ids", &ids_of)
      .def("select", &select, py::arg("keep").noconvert())
      .def("held_out", &held_out, py::arg("fraction"))
      .def("write_jsonl", &write_jsonl, py::arg("keep").noconvert(), py::arg("texts") = py::none());
}

void bind_sha256(py::module_& module) {
  py::class_<cpt::Sha256>(module, "Sha256")
      .def(py::init<bool>(), py::arg("instructions") = true)
      .def("update",
           [](cpt::Sha256& hash, const py::buffer& data) {
             const Bytes bytes(data);
             const py::gil_scoped_release release;
             hash.update(bytes.view());
           })
      .def("digest",
           [](const cpt::Sha256& hash) {
             const cpt::Sha256::Digest digest = hash.digest();
             return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
           })
      .def("saved", [](const cpt::Sha256& hash) { return py::bytes(hash.saved()); })
      .def_static("from_saved", [](const py::bytes& saved) { return cpt::Sha256::from_saved(std::string(saved)); });
}

}  // namespace

void bind_records(py::module_& module) {
  constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();
  bind_block(module);
  bind_sha256(module);
  module.def("parse_jsonl", &parse_jsonl, py::arg("data"), py::arg("text_field"), py::arg("first_line"),
             py::arg("longest") = kNoLimit, py::arg("keep_records") = false);
  module.def("parse_txt", &parse_txt, py::arg("data"), py::arg("first_line"), py::arg("longest") = kNoLimit);
  module.def("parse_columns", &parse_columns, py::arg("texts"), py::arg("names"), py::arg("text_field"),
             py::arg("first_row"), py::arg("longest") = kNoLimit);
  module.def("count_lines", [](const py::buffer& data) {
    const Bytes bytes(data);
    const py::gil_scoped_release release;
    const std::string_view view = bytes.view();
    return std::count(view.begin(), view.end(), '\n');
  });
  module.def("last_border", [](const py::buffer& data, bool paragraphs) {
    const Bytes bytes(data);
    const py::gil_scoped_release release;
    return cpt::last_border(bytes.view(), paragraphs);
  });
  module.def("first_border", [](const py::buffer& data, bool paragraphs) {
    const Bytes bytes(data);
    const py::gil_scoped_release release;
    return cpt::first_border(bytes.view(), paragraphs);
  });
  module.def("unfinished", [](const py::buffer& data, bool paragraphs) {
    const Bytes bytes(data);
    return py::bytes(std::string(cpt::unfinished(bytes.view(), paragraphs)));
  });
}
