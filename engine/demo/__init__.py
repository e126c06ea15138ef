"""The demonstration: real digits, real corruptions, the whole daemon."""
