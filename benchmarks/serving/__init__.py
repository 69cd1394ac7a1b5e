"""Mixed masks against what one would use instead, see ``__main__``."""
