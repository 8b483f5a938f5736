"""Frames to files: mp4 as it is made, and still pictures."""
