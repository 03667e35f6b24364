"""What an answer must match: compiled from what a client sent, then asked which tokens may come next."""
