"""The same iteration with other libraries, each in an environment of its own."""
