"""ZeRO (arXiv:1910.02054): optimizer state, gradients and parameters sharded over data-parallel ranks."""
