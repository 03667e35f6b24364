"""One rank of the model: weights, KV cache, forward pass and sampling behind gRPC."""
