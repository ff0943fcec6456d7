"""Everything that computes: the only package that imports torch, and it imports no typer and no rich."""
