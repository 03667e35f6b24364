"""The shards as the router sees them: one over gRPC (client), all of them as one (group)."""
