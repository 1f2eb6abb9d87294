"""Complete recipes of one page, and experiments; no part of the package."""
