"""The guidance module and how it is put on a pipeline."""
