"""What is kept: files, the folders of runs, records, and the ledger of an attack. No torch."""
