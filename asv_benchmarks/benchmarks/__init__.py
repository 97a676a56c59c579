"""Benchmarks of batchnorm over time, for airspeed velocity."""
