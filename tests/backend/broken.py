"""A module that fails as an installed TensorRT without its libraries does."""

raise ImportError("libnvinfer.so.11 not found")
