"""Code that several packages share: specs, keys, hashes, devices, files."""
