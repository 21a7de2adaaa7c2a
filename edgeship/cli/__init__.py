"""The command line: click, and nothing but click."""
