"""Other ways in which guests could talk to their hosts, kept to show why the pool is as it is."""
