"""Ops that are launched from C++: what one run in Python allocated and launched is repeated without Python.

A provider of an op costs some ninety microseconds of host time a launch in Python, most of it in deciding again what
the arguments decide: which kernel, which grid, what sizes. ``replay.cpp`` finds these decisions by the signature of the
arguments, and repeats them.
"""
