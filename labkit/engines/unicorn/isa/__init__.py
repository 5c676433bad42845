"""One family of files per architecture: what the host does at each sensitive instruction."""
