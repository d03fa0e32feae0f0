// megatron_cpt.data._native: the C++17 core of the data path.
#include "bindings.hpp"

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ core of megatron_cpt.data.";
  bind_records(module);
  bind_order(module);
  bind_packing(module);
  bind_minhash(module);
  bind_text(module);
  bind_encoder(module);
}
