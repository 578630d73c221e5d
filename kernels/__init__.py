"""Fused kernels and the benchmarks of cfgsafe."""
