"""One file a verb: what it is asked on the command line, a job, what it prints. Heavy imports inside the functions."""
