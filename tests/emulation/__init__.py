"""The GPU build without a GPU: real CUDA builds and Transformer Engine's Python, with stand-ins for the driver's libraries."""
