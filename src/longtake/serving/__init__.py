"""Many live streams behind one page: one thread makes them all, sockets hand them out."""
