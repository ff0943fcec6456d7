"""Evaluation under attack: who is asked, who checks, and what says whether to trust it."""
