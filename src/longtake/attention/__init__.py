"""Attention as pure functions of tensors: no state, no configuration."""
