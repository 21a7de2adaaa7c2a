"""The ship passes."""
