"""Region heads that run in stages, and their parts from yaml configs."""
