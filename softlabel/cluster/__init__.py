"""Generation past one machine, on Dask; nothing else imports it but the command line."""
