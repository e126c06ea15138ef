"""What `adaptd init` writes."""
