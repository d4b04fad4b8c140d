"""Tests of reading, checking and explaining the config."""
