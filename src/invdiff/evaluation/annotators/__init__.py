"""What names the classes in images: one file for each kind of annotator, how to load one and how to measure it."""
