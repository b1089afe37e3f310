"""The web page (`stllm demo`): chat about a video, with the frames that the model sees and evidence for its answers."""
