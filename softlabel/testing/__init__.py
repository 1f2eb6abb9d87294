"""Contract tests for sources and encodings of other packages: subclass them in a test module, with pytest installed.

No other package of softlabel imports this one.
"""

import pytest

# Before the modules are imported, so that a failed assert in them shows its values.
pytest.register_assert_rewrite("softlabel.testing.source", "softlabel.testing.encoding")

from softlabel.testing.encoding import EncodingTests  # noqa: E402
from softlabel.testing.encoding_case import EncodingCase  # noqa: E402
from softlabel.testing.source import ExpectedSample, SourceTests  # noqa: E402

__all__ = ["EncodingCase", "EncodingTests", "ExpectedSample", "SourceTests"]
