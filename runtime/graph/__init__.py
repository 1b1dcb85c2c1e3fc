"""Read, validate, summarize, edit, run, round and compare ONNX graphs."""
