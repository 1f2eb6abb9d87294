"""What an input is: how an image is decoded, identified by its content, and brought to a network's size."""
