"""Rules that turn an estimate into a step."""
