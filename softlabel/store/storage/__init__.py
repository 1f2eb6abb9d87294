"""Storage of a store's files: on a local disk, or behind a URL."""
