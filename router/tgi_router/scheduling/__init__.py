"""Who runs next, in which KV blocks, and the loop that drives the shards with it."""
