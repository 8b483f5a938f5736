"""From a many-step bidirectional teacher to a few-step streaming student."""
