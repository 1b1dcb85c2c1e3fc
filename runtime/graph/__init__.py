"""Everything about ONNX graphs: read, validate, summarize, edit, run, round and compare them."""
