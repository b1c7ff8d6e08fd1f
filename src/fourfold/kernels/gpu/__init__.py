"""Kernels for GPUs, in Triton. Imported only where a tensor is on a GPU: torch for a CPU comes without it."""
