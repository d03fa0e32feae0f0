"""Build the C++17 core behind `megatron_cpt.data`; everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("MEGATRON_CPT_BUILD_JOBS", default=2).install()

sources = sorted(glob("csrc/*.cpp"))
native = [
    Pybind11Extension(
        "megatron_cpt.data._native",
        sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.hpp")),
        cxx_std=17,
        extra_compile_args=["-O3"],
    )
]
setup(ext_modules=native if sources else [], cmdclass={"build_ext": build_ext})
