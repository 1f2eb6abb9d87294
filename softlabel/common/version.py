"""The version of the package, here so that all of its modules can import it."""

VERSION = "0.1.0"
