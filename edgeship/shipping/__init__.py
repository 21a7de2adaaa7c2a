"""The bundle on disk: publish it atomically, read it back, find any changed byte."""
