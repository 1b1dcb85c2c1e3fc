"""The parts of `runtime.backends.tensorrt`: which engines may run, how a batch fits one, and what runs it."""
