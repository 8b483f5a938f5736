"""Networks on one device: they read memory and know no schedule."""
