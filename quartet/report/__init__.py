"""What became of a graph, as a table, a drawing, and Python that runs."""
