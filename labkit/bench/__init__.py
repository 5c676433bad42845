"""The figures labkit promises, each measured against a peer in the same run; `labkit bench` prints them."""
