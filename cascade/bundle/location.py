"""Where a store is. Apart from ``cascade.bundle.store``, so that to ask it takes no PyTorch."""


def is_url(where: str) -> bool:
    """Whether a store is given as a URL and not as a folder."""
    return "://" in where or "::" in where
