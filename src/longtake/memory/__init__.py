"""What a stream remembers. A forward pass only reads it; only `commit` writes it."""
