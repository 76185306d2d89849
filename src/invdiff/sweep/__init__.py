"""Experiments: any settings varied over one config file, into one tidy table."""
