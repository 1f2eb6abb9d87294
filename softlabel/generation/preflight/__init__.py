"""Before anything is spent: label a sample, look at the answers, estimate time and bytes, refuse what must fail."""
