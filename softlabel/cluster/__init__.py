"""Generation on several machines with Dask; only the command line imports it."""
