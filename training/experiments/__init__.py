"""The paper's tables and figures, one per file: `python -m training.experiments.<name>`; docs/paper.md maps them."""
