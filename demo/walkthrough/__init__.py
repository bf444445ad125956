"""The parts of `make demo`: training in sub-processes, pictures, and the report."""
