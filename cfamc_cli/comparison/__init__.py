"""From the records of runs to tables of what may be compared. No torch, no terminal."""
