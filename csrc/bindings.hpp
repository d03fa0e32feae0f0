// The parts of megatron_cpt.data._native: each bind_*.cpp adds its own.
#pragma once

#include <pybind11/pybind11.h>

void bind_records(pybind11::module_& module);
void bind_order(pybind11::module_& module);
void bind_packing(pybind11::module_& module);
void bind_minhash(pybind11::module_& module);
void bind_text(pybind11::module_& module);
void bind_encoder(pybind11::module_& module);
