"""The backend `pallas_gpu`: Pallas kernels for NVIDIA Hopper and Blackwell (Mosaic GPU)."""
