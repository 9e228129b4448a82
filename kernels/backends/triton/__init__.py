"""The backend `triton`: Triton kernels, through jax-triton."""
