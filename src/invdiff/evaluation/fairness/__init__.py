"""Fairness from counts of images: metrics, floors of a fair sampler, intervals, and corrections for the annotator."""
