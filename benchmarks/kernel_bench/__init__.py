"""The parts of `bench_kernels.py`: what is measured, by which providers, and how a row of the table is made."""
