"""The router: HTTP requests in, step plans to the shards, streamed answers out."""
