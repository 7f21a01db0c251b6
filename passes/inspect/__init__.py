"""Ops that measure what runs through a graph and leave its numbers as they are."""
