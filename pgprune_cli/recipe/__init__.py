"""Recipes: the schema, the strict YAML reader, and the text a resolved recipe is written as."""
