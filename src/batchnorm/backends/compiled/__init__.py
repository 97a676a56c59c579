"""Loops that Numba compiles, for `kernels/numba.py`."""
