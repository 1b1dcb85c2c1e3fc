"""From a folder of images to a robust image classifier in a TensorRT engine."""
