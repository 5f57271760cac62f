"""The arithmetic of quantization: numpy only, no onnx, no files."""
