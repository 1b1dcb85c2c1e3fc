"""Dynamic batching: requests of many threads and tasks run in shared batches."""
