"""The experiment on temporal understanding: each video input is trained on the toy world in the same way."""
