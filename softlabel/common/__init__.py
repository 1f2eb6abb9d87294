"""What several packages share and none of them owns: specs, keys, hashes, devices, files."""
