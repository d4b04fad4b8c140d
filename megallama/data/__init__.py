"""Documents to packed token shards to exactly resumable batches."""
