"""What a sample is (an image, an array, a text), its content hash, and how a network takes it."""
