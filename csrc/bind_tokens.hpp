// Token streams of any type of the format, as Python gives them.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>

namespace cpt {

// A row of tokens without Python: its reader may work while others hold the interpreter.
class TokenStream {
 public:
  // Throws std::invalid_argument where it is not one contiguous row. `stream` must outlive this.
  explicit TokenStream(const pybind11::array& stream)
      : data_(stream.data()), size_(stream.size()), kind_(stream.dtype().kind()), width_(stream.itemsize()) {
    if (stream.ndim() != 1 || !(stream.flags() & pybind11::array::c_style))
      throw std::invalid_argument("the token stream must be one contiguous row");
  }

  std::int64_t size() const { return size_; }

  // Calls `read` with a pointer to the first token, of its true type.
  // Throws std::invalid_argument where that is none of the format's.
  template <typename Read>
  void visit(Read read) const {
    const auto is = [this](char kind, pybind11::ssize_t width) { return kind_ == kind && width_ == width; };
    if (is('u', 2)) read(static_cast<const std::uint16_t*>(data_));
    else if (is('i', 4)) read(static_cast<const std::int32_t*>(data_));
    else if (is('u', 1)) read(static_cast<const std::uint8_t*>(data_));
    else if (is('i', 1)) read(static_cast<const std::int8_t*>(data_));
    else if (is('i', 2)) read(static_cast<const std::int16_t*>(data_));
    else if (is('i', 8)) read(static_cast<const std::int64_t*>(data_));
    else throw std::invalid_argument("the token stream holds no integer type of the format");
  }

 private:
  const void* data_;
  std::int64_t size_;
  char kind_;
  pybind11::ssize_t width_;
};

}  // namespace cpt
