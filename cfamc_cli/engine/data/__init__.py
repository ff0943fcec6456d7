"""Images: data sets by name, folders, their archives and packed files."""
