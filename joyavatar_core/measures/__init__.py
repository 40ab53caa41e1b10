"""Measures of talking-head video: a reader of mouths, and the statistics that are made of what it reads."""
