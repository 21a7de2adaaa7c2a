"""The vocabulary: records, protocols and the registry. Standard library only."""
