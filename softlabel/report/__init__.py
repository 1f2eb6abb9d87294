"""One file that shows what a store of soft labels, and the students trained on it, are worth."""
