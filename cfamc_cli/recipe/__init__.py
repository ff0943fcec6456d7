"""The recipe: its schema, how it is read, how its problems are worded, and what a run of it costs. No torch."""
