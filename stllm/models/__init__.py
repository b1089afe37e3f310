"""The model, part by part: vision -> qformer -> projection -> video_inputs -> masking -> language_model."""
