"""Annotators, fairness and quality metrics, and the evaluation of generated images."""
