"""Benchmarks of the kernels, one command a family; `kernels/README.md` says how to run them."""
