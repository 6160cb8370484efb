"""Watching a training from inside of its step."""
