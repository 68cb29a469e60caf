"""Tokens in, tokens out: scheduling, pages, device state, and the step loop."""
