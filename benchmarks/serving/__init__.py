"""Mixed masks against the alternatives; see ``__main__``."""
