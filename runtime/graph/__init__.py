"""ONNX graphs: read, check, summarize, edit, run and compare them."""
