"""Pages for people: the report of a run. They read the run folder and know nothing of training."""
