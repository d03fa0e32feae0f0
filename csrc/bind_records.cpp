// Python face of blocks of documents.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "block.hpp"

namespace py = pybind11;

namespace {

cpt::Block from_texts(const py::list& texts) {
  cpt::Block block;
  for (const py::handle& text : texts) {
    py::ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (data == nullptr) throw py::error_already_set();
    block.add({data, static_cast<std::size_t>(size)}, {}, static_cast<std::int64_t>(block.size()) + 1);
  }
  return block;
}

py::list texts_of(const cpt::Block& block) {
  py::list texts(block.size());
  for (std::size_t k = 0; k < block.size(); ++k) {
    const std::string_view text = block.document(k);
    texts[k] = py::str(text.data(), text.size());
  }
  return texts;
}

}  // namespace

void bind_records(py::module_& module) {
  py::class_<cpt::Block>(module, "Block")
      .def_static("from_texts", &from_texts, py::arg("texts"))
      .def("__len__", &cpt::Block::size)
      .def_property_readonly("text_bytes", [](const cpt::Block& block) { return block.text.size(); })
      .def("texts", &texts_of);
}
