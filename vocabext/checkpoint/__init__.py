"""A model folder: config, shards, tensors with a row per token id, rows files, the manifest."""
