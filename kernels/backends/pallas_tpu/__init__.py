"""The backend `pallas_tpu`: Pallas kernels for TPUs (Mosaic)."""
