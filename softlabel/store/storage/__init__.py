"""Where the files of a store lie: on a local disk, or behind a URL."""
