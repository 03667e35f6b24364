"""Checkpoints: find the tensors, read each rank's part of them, convert what is not safetensors."""
