"""Tensor-parallel layers: each file is one concept; `linear_function.py` is where ops and collectives meet."""
