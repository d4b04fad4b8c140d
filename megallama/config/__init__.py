"""The YAML of a run: its schema, how it is read and checked, and how it is explained."""
