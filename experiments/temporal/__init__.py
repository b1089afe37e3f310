"""The experiment on time: every video input, trained alike on the toy world."""
