"""Who may start, who waits and who comes back when: bounded, fair queues for the whole cluster."""
