"""Converters from the torch program to each runtime's own format, storing exactly what compression decided."""
