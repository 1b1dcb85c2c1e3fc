"""The parts of `runtime.batching.batcher`: whose turn it is, what was counted, and the threads that run batches."""
