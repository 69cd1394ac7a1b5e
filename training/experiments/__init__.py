"""The paper's tables and figures, one a file: `python -m training.experiments.<name>`; docs/paper.md maps them."""
