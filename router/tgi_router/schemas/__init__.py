"""Bodies of requests and replies as typed data, one file per family of routes."""
