"""The Triton programs. Importing any module of this package imports Triton, so only `gpu.launches` does, at the first CUDA tensor."""
