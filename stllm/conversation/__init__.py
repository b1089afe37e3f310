"""Talking about a video: prompts as data, and the one engine behind chat, demos and benchmarks."""
