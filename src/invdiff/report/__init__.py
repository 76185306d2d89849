"""Pictures and reports made from results; never imports torch."""
