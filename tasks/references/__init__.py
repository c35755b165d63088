"""References that stages exchange, and how to open what they refer to."""
