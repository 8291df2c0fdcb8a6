"""The work behind each command: a job reads its input and calls the folders below in order."""
