"""Rewrites that single recipes ask for before anything is quantised."""
