"""Dynamic batching: run the requests of many threads and tasks in shared batches."""
