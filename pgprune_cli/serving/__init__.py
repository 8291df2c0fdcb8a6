"""Runtimes that load exported models by what pgprune registers there."""
