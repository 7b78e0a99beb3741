"""The doctor: whether a machine, a cluster, a store and a server can do what diccae asks."""
