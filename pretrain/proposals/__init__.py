"""Object proposals for methods that learn from boxes: how they are found, filtered, stored and read."""
