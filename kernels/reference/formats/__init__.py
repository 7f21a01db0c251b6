"""Formats: elements, scales, and how codes lie in memory."""
