"""What is wrong in a file of lines."""


def describe_error(error: Exception, path: str) -> str:
    """Return an error of the csv module as it is, and one of UTF-8 with its line and a remedy."""
    if not isinstance(error, UnicodeDecodeError):
        return str(error)
    with open(path, "rb") as file:  # the error has a place in a part of the file
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                byte = line[wrong.start]
                return f"byte 0x{byte:02x} in line {number}; convert it, such as with 'iconv -f latin1 -t utf-8'"
    return str(error)
