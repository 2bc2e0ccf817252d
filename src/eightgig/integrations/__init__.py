"""Other people's programs, each through its own interface; none is needed to train."""
