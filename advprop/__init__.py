"""Train image classifiers with AdvProp, export them to ONNX and build TensorRT engines."""
