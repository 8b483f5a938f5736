"""A small cartoon world whose every picture is known exactly, and the words that describe it."""
