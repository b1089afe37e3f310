"""The browser demo: talk with a video, see what it saw, and what the answer rests on."""
