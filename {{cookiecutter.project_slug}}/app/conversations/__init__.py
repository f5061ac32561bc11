"""Conversations, the example of jobs: ended over HTTP at once, scored by a worker later."""
