"""Fitting the biased base, and the guidance module beside it."""
