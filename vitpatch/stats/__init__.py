"""Effects of images → means, intervals and tests."""
