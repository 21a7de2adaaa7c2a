"""The load passes."""
