"""What a person sees on stderr, and the signals that stop a command."""
