"""What people read: the terminal, sheets, pictures, the page, the model card."""
