"""Graphs that ONNX Runtime cannot run, as exactly equal graphs of standard operators that it can."""
