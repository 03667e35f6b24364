"""The launcher: plans, starts and supervises the shards and the router."""
