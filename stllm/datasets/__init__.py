"""Data: frame sampling, media readers, clips, and the data sets made of them."""
