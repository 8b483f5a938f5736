"""Judging streams from outside: do they follow the text, do they last, do they remember, are they fast."""
