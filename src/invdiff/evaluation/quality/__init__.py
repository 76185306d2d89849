"""How good and how different images are: distances and diversity in feature space, and the features."""
