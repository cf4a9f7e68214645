"""Starting a team on this host: workers forked from one process, supervised until the last has ended."""
