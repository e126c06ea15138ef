"""Where records come from and go to: Kafka, files and memory, codecs, the join store and the journal.

This package knows nothing of models, tensors or policies; it imports none of the other packages.
"""
