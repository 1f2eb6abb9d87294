"""Inputs of networks: decoding images, hashing their content, and resizing them."""
