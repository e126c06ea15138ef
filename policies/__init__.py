"""What adaptation means: interfaces, registry and the methods.

A method never sees a stream, the event loop, a clock or a path.
"""
